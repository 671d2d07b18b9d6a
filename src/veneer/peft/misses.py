"""What is said where a config's names hit nothing of a model: what was asked, what is near, what there is."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from veneer.io.dialects.hf_family import Family, layer_of
from veneer.io.dialects.hf_names import is_target
from veneer.io.dialects.hf_types import file_type
from veneer.io.records import BaseMap
from veneer.peft.types import PeftType

#: kinds of weights that PEFT has LoRA on
_LORA_KINDS = ("linear", "conv1d", "conv", "embedding", "attention")
#: so many names are listed
_MANY = 12


def nothing(base: BaseMap, config: Any, rules: Mapping[str, Any], excluded: Collection[str]) -> str:
    """Why a config adapts nothing. rules: what it says of modules; excluded: the modules that these take away."""
    targets = config.target_modules
    if len(excluded) == len(base.modules):
        return ("All modules were excluded, which is hardly meant; look at exclude_modules="
                f"{shown(getattr(config, 'exclude_modules', None))} and modules_to_save={config.modules_to_save}")
    layers = "".join(f" {name} is {getattr(config, name)!r}." for name in ("layers_to_transform", "layers_pattern")
                     if getattr(config, name, None) is not None)
    if not targets and not excluded:
        return _no_targets(base, config)
    if not excluded:
        there = [name for name in base.modules if is_target({**rules, "layers_to_transform": None}, name)]
        why = f". {there[0]!r} and {len(there) - 1} more fit but for their layer's number." if there else \
            hint(targets, base.modules) or f". {could_be(base, config)}."
        return f"Target modules {shown(targets)} not found in the base model{why}{layers}"
    hit = [name for name in excluded if is_target({"target_modules": targets}, name)]
    why = (f"{hit[0]!r}{f' and {len(hit) - 1} more' if hit[1:] else ''} would fit, and exclude_modules or "
           "modules_to_save (what is trained whole is not adapted) takes them away." if hit else
           f"none fits, with {len(excluded)} excluded{hint(targets, base.modules) or '.'}")
    return f"No modules were targeted for adaptation by target_modules={shown(targets)}: {why}{layers}"


def _no_targets(base: BaseMap, config: Any) -> str:
    if config.peft_type != PeftType.LORA:
        return f"No `target_modules` passed. {could_be(base, config)}."
    wanted = config.target_parameters
    if not wanted:
        return f"No `target_modules` passed and no `target_parameters` either. {could_be(base, config)}."
    return (f"No `target_modules` passed but also no `target_parameters` found: {shown(wanted)}"
            f"{hint(wanted, base.by_path) or '.'}")


def could_be(base: BaseMap, config: Any) -> str:
    """The last parts of the names of what the config's method can adapt, as a sentence without its full stop."""
    kind = file_type({"peft_type": config.peft_type.value})
    ends: dict[str, None] = {}
    for site in base.sites.values():
        for spot in site.spots:
            fits = layer_of(site, spot) in kind.layers if isinstance(kind, Family) else spot.kind in _LORA_KINDS
            if fits and spot.module:
                ends[spot.module.rpartition(".")[2]] = None
    if not ends:
        return f"The model has no layer that {config.peft_type.value} can adapt"
    more = f" and {len(ends) - _MANY} more" if len(ends) > _MANY else ""
    return f"Names of layers that can be adapted end in {', '.join(map(repr, list(ends)[:_MANY]))}{more}"


def shown(entries: Any) -> str:
    """Entries as they were written, in an order that stays."""
    if entries is None or isinstance(entries, str):
        return repr(entries)
    return "{" + ", ".join(map(repr, sorted(entries))) + "}"


def hint(entries: Any, names: Iterable[str]) -> str:
    """What was probably meant, as a clause with its end: a list of names where there is a regex, or the nearest last
    part of a name; else nothing."""
    names = list(names)
    if isinstance(entries, str):
        hit = [name for name in names if is_target({"target_modules": [entries]}, name)]
        if hit:
            more = f" and {len(hit) - 1} more" if hit[1:] else ""
            return (f"; a string is a regular expression for the whole name: write [{entries!r}], a list, to hit "
                    f"{hit[0]!r}{more}.")
    words = re.split(r"[^\w]+", entries) if isinstance(entries, str) else [e.rpartition(".")[2] for e in entries]
    ends = Counter(part for name in names for part in name.split(".") if not part.isdigit())
    for word in sorted(filter(None, words), key=len, reverse=True):
        match = difflib.get_close_matches(word, list(ends), n=1, cutoff=0.5)
        if match and match[0] != word:
            return f"; did you mean {match[0]!r} ({ends[match[0]]} like it)?"
    return ""
