"""Which tensors of a checkpoint are which parameters of a model: for transformers' models as transformers loads them.

A checkpoint's name may differ from the model's (a prefix, a renamed layer), and one parameter may be made of several
tensors (fused experts) or several of one. transformers knows how both ways, and this is the one file that asks it.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.method import VeneerError

_NEEDED = {"WeightRenaming", "WeightConverter", "dot_natural_key", "rename_source_key", "revert_weight_conversion"}


@dataclass
class Group:
    """Tensors of a checkpoint that are loaded together: `keys` there, `params` in the model; `converter` where the
    tensors are not the parameters as they are, with the pattern that found each key."""

    params: tuple[str, ...]
    keys: list[str] = field(default_factory=list)
    converter: Any = None
    patterns: dict[str, str] = field(default_factory=dict)


class Names:
    """The groups of a model, one for each key. This class is for models whose parameters are named as in the file."""

    model: Any

    def __init__(self, model: nn.Module, keys: Iterable[str]) -> None:
        self.model = model
        self.groups = [Group((key,), [key]) for key in keys]

    def load(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that tensors of the checkpoint make."""
        return {group.params[0]: tensors[group.keys[0]]}

    def store(self, group: Group, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `load`."""
        return {group.keys[0]: params[group.params[0]]}

    def refusal(self, group: Group) -> str | None:
        """Why parameters of this group cannot be written back, or None."""
        return None

    def wide(self, param: str, dtype: torch.dtype) -> bool:
        """The model keeps this parameter in fp32 where it is loaded in `dtype`."""
        return False


class TransformersNames(Names):
    """For a `PreTrainedModel`."""

    def __init__(self, model: Any, keys: Iterable[str]) -> None:
        self.model = model
        loading = _loading()
        mapping = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
        renamings = [each for each in mapping if isinstance(each, loading.WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, loading.WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        state, prefix = model.state_dict(), model.base_model_prefix
        found: dict[str, Group] = {}
        for key in sorted(keys, key=loading.dot_natural_key):
            name, pattern = loading.rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = loading.rename_source_key(key, [], [], prefix, state)
            converter = None if pattern is None else by_pattern[pattern]
            group = found.setdefault(name, Group(_targets(name, converter), converter=converter))
            group.keys.append(key)
            if pattern is not None:
                group.patterns[key] = pattern
        self.groups = list(found.values())
        self.used = [each for each in mapping if each.was_used()]

    def load(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if group.converter is None:
            return super().load(group, tensors)
        converter = copy.deepcopy(group.converter)
        for key in group.keys:
            converter.add_tensor(group.params[0], key, group.patterns[key], tensors[key])
        made = converter.convert(group.params[0], model=self.model, config=self.model.config)
        return {name: part[0] if isinstance(part, list) else part for name, part in made.items()}

    def store(self, group: Group, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if group.converter is None:
            return super().store(group, params)
        self.model._weight_conversions = self.used
        made = _loading().revert_weight_conversion(self.model, dict(params))
        known = {known: key for key in group.keys for known in self._spellings(key)}
        if {known.get(name) for name in made} != set(group.keys) or len(made) != len(group.keys):
            raise VeneerError(f"merge_checkpoint: transformers makes other tensors of {group.params[0]!r} than those "
                              f"it was made of: {', '.join(sorted(made)[:3])}, not {', '.join(group.keys[:3])}. Load "
                              "the model and merge it in memory")
        return {known[name]: tensor for name, tensor in made.items()}

    def _spellings(self, key: str) -> list[str]:
        """A key as the whole model would write it, and as its bare body would."""
        prefix = f"{self.model.base_model_prefix}."
        return [key, prefix + key, key.removeprefix(prefix)]

    def refusal(self, group: Group) -> str | None:
        if group.converter is None:
            twice = len(group.keys) > 1
            return f"the checkpoint has it as {' and as '.join(map(repr, group.keys))}" if twice else None
        try:
            group.converter.reverse_transform()
        except (NotImplementedError, ValueError, AttributeError) as error:
            return f"transformers makes it of {len(group.keys)} tensors and knows no way back ({error})"
        return None

    def wide(self, param: str, dtype: torch.dtype) -> bool:
        patterns = set(self.model._keep_in_fp32_modules_strict or ())
        patterns |= set(self.model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
        return any(re.search(pattern.replace("*", ".*"), param) for pattern in patterns)


def _targets(name: str, converter: Any) -> tuple[str, ...]:
    """The parameters that a group makes, whose first is called `name`."""
    if converter is None:
        return (name,)
    first, *rest = converter.target_patterns
    return (name, *(name.replace(first, each) for each in rest))


def names_of(model: nn.Module, keys: Sequence[str]) -> Names:
    """How a checkpoint with these tensors stands to a model."""
    library: Any = sys.modules.get("transformers")  # without it the model is none of its
    if library is not None and isinstance(model, library.PreTrainedModel):
        return TransformersNames(model, keys)
    return Names(model, keys)


def skeleton(folder: Path) -> nn.Module:
    """The model that a folder's config.json describes, on the meta device: its structure without its weights.

    Raises `VeneerError` where transformers is missing or does not know the model.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise VeneerError(f"merge_checkpoint: there is no config.json in {folder} that would say what the model is; "
                          "give its structure: model=… on the meta device, its parameters named as in the files")
    transformers = _transformers()
    try:
        read = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        kinds: list[Callable[[Any], Any]] = [getattr(transformers, name) for name in read.architectures or ()
                                             if name in dir(transformers)]
        kind = kinds[0] if kinds else transformers.AutoModelForCausalLM.from_config
        with torch.device("meta"):
            return kind(read).eval()
    except (OSError, ValueError, ImportError) as error:
        raise VeneerError(f"merge_checkpoint: transformers cannot build the model of {config}: "
                          f"{str(error).strip().splitlines()[0]}. Give its structure: model=… on the meta device") \
            from error


def quantised(folder: Path) -> str | None:
    """In what way the weights in a folder are no ordinary numbers, by its config.json, or None where they are."""
    config = folder / "config.json"
    if not config.is_file():
        return None
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VeneerError(f"merge_checkpoint: {config} is no JSON file ({error})") from error
    settings = found.get("quantization_config") if isinstance(found, dict) else None
    if not settings:
        return None
    return str(settings.get("quant_method", "unknown")) if isinstance(settings, dict) else "unknown"


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        raise VeneerError("merge_checkpoint builds the model's structure with transformers, which is not installed: "
                          "pip install 'veneer[train]', or give model=… on the meta device") from None


def _loading() -> Any:
    """transformers' rules for names, which have no public entry and are younger than its version 5.0."""
    try:
        found = importlib.import_module("transformers.core_model_loading")
    except ModuleNotFoundError:
        found = None
    if found is None or not set(dir(found)) >= _NEEDED:
        raise VeneerError("merge_checkpoint: this version of transformers does not say how it names weights in files; "
                          "update it, or load the model and merge it in memory")
    return found
