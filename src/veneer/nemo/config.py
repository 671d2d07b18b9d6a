"""PeftConfig: the settings of NeMo AutoModel's LoRA, and the method each weight gets from them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from veneer.method import Method, VeneerError, VeneerWarning, check_positive_int, check_probability, nearest
from veneer.methods import DoRA, LoRA
from veneer.methods.options import check_bool, check_number

POSITIONS = {"pre": "input", "post": "output"}
#: NeMo's names of starts → Veneer's
STARTS = {"xavier": "xavier", "uniform": "kaiming", "kaiming": "kaiming"}
_DTYPES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "half": torch.float16,
    "float16": torch.float16, "fp32": torch.float32, "float": torch.float32, "float32": torch.float32,
    "double": torch.float64, "float64": torch.float64,
}
#: keys of a YAML file's section that are not for the config
_PASSED_OVER = ("_target_",)


@dataclass
class PeftConfig:
    """As in NeMo AutoModel; the scale is alpha/dim. See docs/coming-from-nemo.md.

    target_modules: names of modules, in which `*` stands for anything; or a regex that matches a whole name.
    exclude_modules: adapt every linear layer but these; not together with target_modules.
    match_all_linear: adapt every linear layer, whatever the two say.
    dim, alpha: rank, and alpha of the scale alpha/dim.
    dropout, dropout_position: in training, on the adapter's input ("pre") or on what it puts out ("post").
    lora_A_init: "xavier", "uniform" (also known as "kaiming"). B starts at zero.
    lora_dtype: of the adapter, a dtype or its name; None = the layer's own.
    use_triton: accepted; Veneer's fused op runs either way.
    use_dora: DoRA instead of LoRA. moe_rank_scaling: experts get dim divided by the experts active per token.
    use_memory_efficient_lora: accepted; Veneer's op is so either way. expert_weight_format: "unquantized" alone.

    Raises `VeneerError` for a value that cannot be, naming what is possible.
    """

    target_modules: list[str] | str | None = field(default_factory=list)
    exclude_modules: list[str] | str | None = field(default_factory=list)
    match_all_linear: bool = False
    dim: int = 8
    alpha: float = 32
    dropout: float = 0.0
    dropout_position: str = "post"
    lora_A_init: str = "xavier"
    lora_dtype: torch.dtype | str | None = None
    use_triton: bool = False
    use_dora: bool = False
    moe_rank_scaling: bool = False
    use_memory_efficient_lora: bool = True
    expert_weight_format: str = "unquantized"

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise `VeneerError` unless every field has a value that can be; fields may have been set since."""
        check_positive_int("PeftConfig", "dim", self.dim)
        check_number("PeftConfig", "alpha", self.alpha)
        check_number("PeftConfig", "dropout", self.dropout)
        check_probability("PeftConfig", "dropout", self.dropout)
        _check_choice("dropout_position", self.dropout_position, POSITIONS)
        _check_choice("lora_A_init", self.lora_A_init, STARTS)
        _check_choice("expert_weight_format", self.expert_weight_format, ("unquantized",))
        dtype_of(self.lora_dtype)
        for name in ("match_all_linear", "use_triton", "use_dora", "moe_rank_scaling", "use_memory_efficient_lora"):
            check_bool("PeftConfig", name, getattr(self, name))
        for name in ("target_modules", "exclude_modules"):
            names_of(name, getattr(self, name))

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, as they are."""
        return dict(self.__dict__)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> PeftConfig:
        """The config from `to_dict`'s or a YAML file's keys; what is left out takes its default, what is no field is
        passed over with a `VeneerWarning`."""
        fields = [f.name for f in dataclasses.fields(cls)]
        for name, value in d.items():
            if name not in (*fields, *_PASSED_OVER) and value is not None:
                warnings.warn(f"PeftConfig has no field {name!r}{nearest(str(name), fields) or '.'} It is passed over",
                              VeneerWarning, stacklevel=2)
        return cls(**{name: d[name] for name in fields if name in d})

    def method(self, weight_dtype: torch.dtype, dim: int | None = None, dropout: bool = True) -> Method:
        """What a weight that is read as `weight_dtype` gets; dim: instead of the config's; dropout: False for none."""
        self.check()
        dtype = dtype_of(self.lora_dtype) or weight_dtype
        lora = LoRA(rank=self.dim if dim is None else dim, alpha=self.alpha, dropout=self.dropout if dropout else 0.0,
                    dropout_on=POSITIONS[self.dropout_position], init=STARTS[self.lora_A_init],
                    dtype=None if dtype == torch.promote_types(weight_dtype, torch.float32) else dtype)
        return DoRA(lora) if self.use_dora else lora


def names_of(field_name: str, value: Any) -> list[str]:
    """The patterns of target_modules or exclude_modules: a list of strings, one string, or None."""
    if value is None:
        return []
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
        raise VeneerError(f"PeftConfig: {field_name} must be a string or a list of strings, got {value!r}")
    return list(found)


def dtype_of(value: Any) -> torch.dtype | None:
    """A dtype by itself, by NeMo's names for it, or None."""
    if value is None or isinstance(value, torch.dtype):
        return value
    found = _DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
    if found is None:
        raise VeneerError(f"PeftConfig: unknown lora_dtype {value!r}{nearest(str(value), _DTYPES) or '.'} "
                          f"Known: {', '.join(_DTYPES)}")
    return found


def _check_choice(name: str, value: Any, known: Any) -> None:
    if not isinstance(value, str) or value not in known:
        raise VeneerError(f"PeftConfig: unknown {name} {value!r}{nearest(str(value), known) or '.'} "
                          f"Known: {', '.join(known)}")
