"""Import of an optional library, with an error that names the extra that brings it."""

from __future__ import annotations

import importlib
from types import ModuleType

from veneer.method import VeneerError

# library → the extra of pyproject.toml that installs it
_EXTRA = {
    "transformers": "train",
    "accelerate": "train",
    "rich": "train",
    "yaml": "train",
    "jinja2": "train",
    "markupsafe": "train",
    "matplotlib": "plot",
    "gguf": "gguf",
}


class MissingExtraError(VeneerError):
    """An optional library is not installed; the message has the command that installs it."""


def require(name: str, why: str) -> ModuleType:
    """The module `name` (dotted names allowed), or `MissingExtraError` saying `why` it is needed.

    Only the absence of the library itself is translated: an installed library that fails to import something
    of its own is that library's error and passes through unchanged.
    """
    library = name.split(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != library:
            raise
        extra = _EXTRA[library]
        raise MissingExtraError(
            f"{why} needs the library {library!r}, which is not installed. "
            f"Install it with: pip install 'veneer[{extra}]'"
        ) from None
