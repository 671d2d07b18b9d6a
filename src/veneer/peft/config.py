"""PeftConfig: what all configs of this front door have, and adapter_config.json both ways.

Names, defaults and the file are those of Hugging Face PEFT 0.21 (peft/config.py).
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from veneer.io.files import write_all
from veneer.method import VeneerError, nearest
from veneer.notices import say
from veneer.peft.errors import NotInVeneerError
from veneer.peft.hub import no_such_path
from veneer.peft.types import FAMILY, PeftType, TaskType

CONFIG_NAME = "adapter_config.json"
#: peft_type → its config class; filled by the modules that define them
PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = {}
#: keywords of `huggingface_hub.hf_hub_download`
_HUB = frozenset({"repo_type", "revision", "library_name", "library_version", "cache_dir", "local_dir", "user_agent",
                  "force_download", "proxies", "etag_timeout", "token", "local_files_only", "headers", "endpoint",
                  "tqdm_class", "dry_run", "resume_download"})


@dataclass
class PeftConfigMixin:
    """The part without a base model. peft_version: of the library that wrote a file, None for Veneer."""

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in list(TaskType):
            known = [task.value for task in TaskType]
            raise ValueError(f"Invalid task type {self.task_type!r}{nearest(str(self.task_type), known) or '.'} "
                             f"Possible: {', '.join(known)}")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, what is a config inside as a dict too; independent of this object."""
        return dataclasses.asdict(self)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write adapter_config.json into the directory, which is made if need be; whole or not at all.

        auto_mapping_dict: what the file is to say under `auto_mapping`. Raises `AssertionError` where
        `save_directory` is a file.
        """
        if Path(save_directory).is_file():
            raise AssertionError(f"save_pretrained needs a directory, and {save_directory} is a file")
        found = plain(self.to_dict())
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        if auto_mapping is not None:
            found["auto_mapping"] = auto_mapping
        _no_effect("save_pretrained of a config", kwargs)
        text = json.dumps(found, indent=2, sort_keys=True).encode()

        def write(file: IO[bytes]) -> None:
            file.write(text)

        write_all(Path(save_directory), [(CONFIG_NAME, write)])

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """The config that `kwargs` means: of the class of its `peft_type`, or of this class where it names none.

        Keys that the class does not have are passed over where they are null, false or empty. Raises `VeneerError`
        for others, since they may change what an adapter computes, and for a `peft_type` outside the LoRA family.
        """
        kind = config_class(kwargs["peft_type"]) if "peft_type" in kwargs else cls
        known = list(inspect.signature(kind).parameters)
        for key in [key for key in kwargs if key not in known]:
            value = kwargs.pop(key)
            if value is not None and value is not False and value not in ([], {}, ""):
                raise VeneerError(f"{kind.__name__} has no setting {key!r} (= {value!r}){nearest(key, known) or '.'} "
                                  "It may come from a newer version of PEFT and change what the adapter computes; "
                                  "remove it from the config if you know that it does not")
        return kind(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None,
                        **kwargs: Any) -> Any:
        """The config in a local directory, else in a repository of the Hugging Face Hub (needs `huggingface_hub`).

        kwargs: those of `hf_hub_download`; names of settings, for what the file leaves out.
        Raises `ValueError` where there is no adapter_config.json, and what `from_peft_type` raises.
        """
        hub = {key: kwargs.pop(key) for key in list(kwargs) if key in _HUB}
        loaded = cls.from_json_file(_config_file(pretrained_model_name_or_path, subfolder, hub))
        kind = config_class(loaded["peft_type"]) if "peft_type" in loaded else cls
        mine = {f.name for f in dataclasses.fields(kind)}
        known = {key: kwargs.pop(key) for key in list(kwargs) if key in mine}
        _no_effect("from_pretrained of a config", kwargs)
        return cls.from_peft_type(**cls.check_kwargs(**{**known, **loaded}))

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        """What a file says, as a dict. A `runtime_config` in it is left out, with a warning.

        Raises `ValueError` where the file is no JSON object.
        """
        try:
            found = json.loads(Path(path_json_file).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise VeneerError(f"{path_json_file} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise VeneerError(f"{path_json_file} holds a {type(found).__name__}; an adapter's config is an object")
        if found.pop("runtime_config", None) is not None:
            say(f"{path_json_file} has a runtime_config, which is ignored: it holds at run time only", UserWarning)
        return found

    @classmethod
    def _get_peft_type(cls, model_id: str | Path, **hub: Any) -> str:
        """The `peft_type` that the config at a path or in a repository announces; takes `subfolder` too."""
        return cls.from_json_file(_config_file(model_id, hub.pop("subfolder", None), hub))["peft_type"]

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """For subclasses: look at, or change, what a file says before a config is made of it."""
        return kwargs

    @property
    def is_prompt_learning(self) -> bool:
        """Never, in this family."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Never, in this family."""
        return False


@dataclass
class PeftConfig(PeftConfigMixin):
    """What every config has beside the options of its method.

    base_model_name_or_path, revision: of the base model. task_type: one of `TaskType`. inference_mode: the adapter is
    not trained. Raises `ValueError` for an unknown task type.
    """

    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False


C = TypeVar("C", bound=type[PeftConfig])


def register_config(peft_type: PeftType) -> Callable[[C], C]:
    """Class decorator: the config class of a `peft_type`."""
    def add(cls: C) -> C:
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = cls
        return cls

    return add


def config_class(peft_type: str | PeftType) -> type[PeftConfig]:
    """The config class of a `peft_type`. Raises `NotInVeneerError` for one of PEFT's other methods, and `VeneerError`
    with the nearest match for a name that is none."""
    names = [kind.value for kind in PeftType]
    if peft_type not in names:
        mine = [kind.value for kind in FAMILY]
        hint = nearest(str(peft_type), mine) or nearest(str(peft_type), names) or "."
        raise VeneerError(f"unknown peft_type {peft_type!r}{hint} Veneer has {', '.join(mine)}")
    found = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType(peft_type))
    if found is None:
        raise NotInVeneerError(f"peft_type {PeftType(peft_type).value!r}: Veneer has the LoRA family "
                               f"({', '.join(kind.value for kind in FAMILY)}); use the original peft for other methods")
    return found


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """The same as JSON can hold it: sets as sorted lists, members of enums as their values."""
    return {key: sorted(value) if isinstance(value, (set, frozenset)) else value.value if isinstance(value, enum.Enum)
            else value for key, value in config.items()}


def _config_file(path: str | Path, subfolder: str | None, hub: dict[str, Any]) -> str:
    local = Path(path, subfolder or "", CONFIG_NAME)
    if local.is_file():
        return str(local)
    if Path(path).is_dir():
        raise ValueError(f"Can't find {CONFIG_NAME!r} at {str(local.parent)!r}")
    reason = no_such_path(path)
    if reason is not None:
        raise ValueError(f"Can't find {CONFIG_NAME!r}: {reason}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ValueError(f"Can't find {CONFIG_NAME!r} at {str(path)!r}: there is no such directory, and looking on the "
                         "Hub needs `pip install huggingface_hub`") from error
    try:
        return hf_hub_download(str(path), CONFIG_NAME, subfolder=subfolder, **hub)
    except Exception as error:
        raise ValueError(f"Can't find {CONFIG_NAME!r} at {str(path)!r}: there is no such directory, and the Hub says: "
                         f"{error}") from error


def _no_effect(what: str, kwargs: dict[str, Any]) -> None:
    if kwargs:
        say(f"{what}: {', '.join(sorted(kwargs))} has no effect here")
