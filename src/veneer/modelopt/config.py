"""ModelOpt's PEFT configs: validated by pydantic, which is imported here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from torch import nn

from veneer.method import VeneerError, nearest

try:
    from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "pydantic":
        raise
    raise ImportError("veneer.modelopt needs the library 'pydantic', which is not installed. Install it with: "
                      "pip install 'veneer[modelopt]'") from None

_INIT = "torch.nn.init."
_SHORT = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _initializer(value: Any) -> Callable[..., Any]:
    """A function of torch.nn.init that fills in place, by itself or by its dotted name."""
    known = {name: found for name, found in vars(nn.init).items()
             if name.endswith("_") and not name.startswith("_") and callable(found)}
    if isinstance(value, str) and value.startswith(_INIT) and value.removeprefix(_INIT) in known:
        return known[value.removeprefix(_INIT)]
    for function in known.values():
        if function is value:
            return function
    word = value if isinstance(value, str) else getattr(value, "__name__", "")
    hint = nearest(word.rpartition(".")[2], known) or "."
    raise VeneerError(f"{value!r} is no in-place function of torch.nn.init{hint} Give its dotted name, such as "
                      f"'{_INIT}kaiming_uniform_'")


def dotted(function: Callable[..., Any]) -> str:
    """The name by which `_initializer` finds it."""
    return f"{_INIT}{function.__name__}"


def _short_dtype(value: Any) -> Any:
    return _SHORT.get(value, value) if isinstance(value, str) else value


def _plain_key(value: Any) -> Any:
    if isinstance(value, str) or callable(value):
        return value
    raise VeneerError("a pattern is a string, in which * ? [] are wildcards, or a callable (name) → bool, "
                      f"got {value!r}")


Initializer = Annotated[
    Any, BeforeValidator(_initializer), PlainSerializer(dotted, return_type=str),
    WithJsonSchema({"type": "string", "title": "torch initializer",
                    "description": "Dotted name of a function of torch.nn.init that fills in place (ends with _).",
                    "examples": [f"{_INIT}zeros_", f"{_INIT}kaiming_uniform_"]})]
Pattern = Annotated[str | Callable[[str], Any], BeforeValidator(_plain_key), WithJsonSchema({"type": "string"})]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, validate_default=True)


class PEFTAttributeConfig(_Config):
    """An adapter of one layer: y = W x + scale · B(A(x)). A field that is not set here is that of an earlier pattern,
    or else the default."""

    enable: bool = Field(default=True, description="False: no adapter on the layer.")
    rank: int = Field(default=64, gt=0, description="Inner width of the pair.")
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="Factor of the pair; no alpha/rank.")
    lora_a_init: Initializer = Field(default=f"{_INIT}kaiming_uniform_", description="What fills A.")
    lora_b_init: Initializer = Field(default=f"{_INIT}zeros_", description="What fills B.")
    lora_dtype: Annotated[Literal["bf16", "fp16", "fp32"] | None, BeforeValidator(_short_dtype)] = Field(
        default=None, description="Dtype of the pair; None: the layer's own. bfloat16, float16, float32 are the same.")
    lora_init_method: Literal["kaiming_zeros", "svdquant"] = Field(
        default="kaiming_zeros", description="kaiming_zeros: by lora_a_init and lora_b_init. svdquant: from the error "
        "of the weight's quantiser; where none is known, A random and B zero, with a warning.")


def _everywhere() -> dict[Any, PEFTAttributeConfig]:
    return {"*": PEFTAttributeConfig()}


class PEFTConfig(_Config):
    """An adapter of a model: which layers it lies on, and how each is made.

    adapter_cfg: pattern → attributes. A pattern is the whole name of a module with wildcards * ? [], or a callable
    (name) → bool; what later ones set overrides what earlier ones set, field by field:
    {"*": {"rank": 32}, "*output_layer*": {"enable": False}}.
    """

    adapter_name: str = Field(default="default", description="A name that no adapter of the model has yet.")
    adapter_cfg: dict[Pattern, PEFTAttributeConfig] = Field(
        default_factory=_everywhere, description="Pattern → attributes; later ones override.")
    adapter_type: Literal["lora"] = Field(default="lora", description="Kind of adapter.")
    freeze_base_model: bool = Field(default=True, description="False: the base stays as trainable as it is.")
    freeze_lora_weights: bool = Field(default=False, description="True: this adapter is not trained.")


class ExportPEFTConfig(_Config):
    """Nothing to set."""


def hits(pattern: Any, names: Mapping[str, bool]) -> bool:
    """Whether a key of adapter_cfg means a layer. names: its names → whether `*` alone means it too."""
    if not isinstance(pattern, str):
        return any(pattern(name) for name in names)
    return any(fnmatchcase(name, pattern) for name, bare in names.items() if bare or pattern.strip("*"))


def attributes(patterns: Mapping[Any, PEFTAttributeConfig], names: Mapping[str, bool]) -> PEFTAttributeConfig | None:
    """What a layer gets, with only those fields set that a pattern sets; None where no pattern means it."""
    found = [given for pattern, given in patterns.items() if hits(pattern, names)]
    fields = {field: getattr(given, field) for given in found for field in given.model_fields_set}
    return PEFTAttributeConfig(**fields) if found else None
