"""By which names PEFT finds modules, and the shortest lists of names that make it find exactly the right ones.

The rules, as of PEFT 0.21 (peft/tuners/tuners_utils.py `check_target_module_exists`, peft/utils/other.py
`get_pattern_key` and `_set_trainable`):

- an entry of `target_modules` or `target_parameters` hits its own name and every name that ends in ".entry";
  a string instead of a list is a regex for the whole name;
- a key of `rank_pattern` or `alpha_pattern` is a regex for the whole name or for what follows a dot; the first
  key that matches counts;
- an entry of `modules_to_save` or `trainable_token_indices` hits every name that ends in it, dot or no dot.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

Matcher = Callable[[str, str], bool]  # (entry, name)


def hits_target(entry: str, name: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def hits_saved(entry: str, name: str) -> bool:
    return name.endswith(entry)


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first key of a rank or alpha pattern that matches, or the default."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def shorten(wanted: Collection[str], known: Iterable[str] | None,
            matches: Matcher = hits_target) -> list[str] | None:
    """Entries that hit exactly `wanted` among `known`: last parts of names where that is safe, else whole names.

    None where even the whole names would hit something else. known: None where they are not known: whole names then.
    """
    if known is None:
        return list(wanted)
    others = set(known) - set(wanted)
    taken = {end for other in others for end in _dotted_ends(other)} if matches is hits_target else set()
    entries: dict[str, None] = {}
    for name in wanted:
        parts = name.split(".")
        for candidate in (parts[-1], ".".join(parts[-2:]), name):
            if candidate in entries or (candidate not in taken if matches is hits_target else
                                        not any(matches(candidate, other) for other in others)):
                entries[candidate] = None
                break
        else:
            return None
    return list(entries)


def _dotted_ends(name: str) -> list[str]:
    """Every entry that `hits_target` this name."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def target_entries(wanted: Collection[str], known: Iterable[str] | None) -> list[str] | str:
    """The same for `target_modules`, which may also be a regex for whole names."""
    short = shorten(wanted, known)
    return short if short is not None else "|".join(re.escape(name) for name in wanted)


def patterns_for(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A rank or alpha pattern that gives each name its value; names with the default's value are left out."""
    made: dict[str, Any] = {}
    for name, value in values.items():
        if value == default or pattern_value(made, name, default) == value:
            continue
        last = re.escape(name.rsplit(".", 1)[-1])
        alike = [v for n, v in values.items() if re.match(rf"(.*\.)?({last})$", n)]
        made[last if all(v == value for v in alike) else f"^{re.escape(name)}"] = value
    return made


def is_target(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT would put a LoRA on the module `name`, by the config alone."""
    excluded = config.get("exclude_modules")
    if excluded and _listed(excluded, name):
        return False
    if any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.get("modules_to_save") or []):
        return False
    target = config.get("target_modules")
    if not target:
        return False
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    if name in target:
        return True
    return _listed(target, name) and _layer_selected(config, name)


def _listed(entries: str | list[str], name: str) -> bool:
    if isinstance(entries, str):
        return re.fullmatch(entries, name) is not None
    return any(hits_target(entry, name) for entry in entries)


def _layer_selected(config: Mapping[str, Any], name: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # Without a layers_pattern PEFT wants a dot before the layer list's name.
    start = r"(?:^|.*?\.)" if config.get("layers_pattern") else r".*?\."
    for pattern in patterns:
        match = re.match(rf"{start}{pattern}\.(?P<index>\d+)\.", name)
        if match:
            return int(match["index"]) in ([layers] if isinstance(layers, int) else layers)
    return False
