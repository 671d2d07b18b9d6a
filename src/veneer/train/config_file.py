"""Reading YAML for configs: duplicate keys are errors, and 1e-4 is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from veneer.train.extras import require
from veneer.train.schema import ConfigError

# YAML 1.1 wants a point and a signed exponent in a number (1.0e-4) and reads 1e-4 as text; YAML 1.2 takes both.
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*)?(\.\d[\d_]*|\.)?([eE][-+]?\d+)$")


def _loader() -> Any:
    yaml: Any = require("yaml", "reading a config file")
    loader_class: Any = type("Loader", (yaml.SafeLoader,), {})

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"key {key!r} stands twice in the same mapping, the second time in line {line}")
            seen.add(key)
        return loader.construct_mapping(node, deep=True)

    loader_class.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    loader_class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    return loader_class


def parse_value(text: str) -> Any:
    """One YAML value from the command line: `3` → 3, `true` → True, `[a, b]` → a list, anything else text."""
    yaml = require("yaml", "reading --set")
    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ConfigError(f"--set: cannot read the value {text!r}: {_one_line(error)}") from None


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `ConfigError` with the place of the mistake."""
    yaml = require("yaml", "reading a config file")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no config file {str(path)!r}{_siblings(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {str(path)!r}: {error}") from None
    try:
        config = yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got {type(config).__name__}")
    return config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _siblings(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {str(path.parent)!r} either"
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml"))
    return f"; YAML files there: {', '.join(names)}" if names else "; no YAML file is in that folder"
