"""Adapters from and to the Hugging Face Hub. The only file of this front door that knows `huggingface_hub`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer.method import VeneerError, nearest

_FILES = ("adapter_config.json", "adapter_model.safetensors", "veneer.json", "veneer.safetensors")
_KEYS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "repo_type")


def local_folder(model_id: str | Path, subfolder: str | None = None, **hub: Any) -> Path:
    """The folder with an adapter's files: a local one as it is, else downloaded from the Hub.

    hub: arguments of `huggingface_hub.snapshot_download`; others are left out. Raises `VeneerError` where there is
    neither. What can only be a path is not asked for at the Hub.
    """
    folder = Path(model_id)
    if folder.is_dir():
        return folder / subfolder if subfolder else folder
    reason = no_such_path(model_id)
    if reason is not None:
        raise VeneerError(reason)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise VeneerError(f"there is no folder {str(model_id)!r}, and looking on the Hugging Face Hub needs `pip "
                          "install huggingface_hub`") from error
    patterns = [f"{subfolder}/{name}" if subfolder else name for name in _FILES]
    known = {key: value for key, value in hub.items() if key in _KEYS and value is not None}
    try:
        found = Path(snapshot_download(str(model_id), allow_patterns=patterns, **known))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise VeneerError(f"there is no folder {str(model_id)!r}, and it cannot be had from the Hugging Face Hub: "
                          f"{error}") from error
    return found / subfolder if subfolder else found


def no_such_path(model_id: str | Path) -> str | None:
    """What is wrong with the name of a folder that is not there, or None where it may be a repository's, which is
    "name" or "owner/name"."""
    path, text = Path(model_id), str(model_id)
    if path.is_file():
        return f"{text!r} is a file; give the folder with the adapter's files"
    if not (text.startswith((".", "~", "/")) or "\\" in text or path.is_absolute() or text.count("/") > 1):
        return None
    above = path.absolute().parent
    beside = [each.name for each in above.iterdir() if each.is_dir()] if above.is_dir() else []
    where = "" if path.is_absolute() else f" below {str(Path.cwd())!r}"
    return f"there is no folder {text!r}{where}{nearest(path.name, beside)}"


def cached_model(name: str | Path) -> Path:
    """The folder of a base model that is on this machine: a local one, or the Hub's copy of it. Never downloads.

    Raises `VeneerError` where there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        return Path(snapshot_download(str(name), local_files_only=True))
    except (ImportError, HFValidationError, LocalEntryNotFoundError) as error:
        raise VeneerError(f"the weights of {str(name)!r} are not on this machine ({error}); give the folder or the "
                          ".safetensors file that has them") from error


def has_file(model_id: str | Path, name: str, subfolder: str | None = None, **hub: Any) -> bool:
    """Whether a local folder, or a repository of the Hub, has a file. One that cannot be asked has none."""
    if Path(model_id).is_dir():
        return Path(model_id, subfolder or "", name).is_file()
    if hub.get("local_files_only"):
        return False
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        path = f"{subfolder}/{name}" if subfolder else name
        return HfApi(token=hub.get("token")).file_exists(str(model_id), path, revision=hub.get("revision"))
    except (ImportError, HfHubHTTPError, HFValidationError, OSError):
        return False


def push(repo_id: str, save: Callable[[str], Any], *, private: bool | None = None, token: str | None = None,
         commit_message: str | None = None, revision: str | None = None) -> Any:
    """Upload what `save(folder)` writes. Returns what `huggingface_hub` says about the commit."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise VeneerError("push_to_hub needs `pip install huggingface_hub`") from error
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision,
                                 commit_message=commit_message or "Upload adapter")
