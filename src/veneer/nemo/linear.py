"""Linear layers by NeMo's names: an adapted layer is a `LinearLoRA`, which shows its A, B and scale."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach import attach
from veneer.forms import Factors
from veneer.hosts import Host
from veneer.hosts.linear import LinearHost
from veneer.hosts.packed import PackedHost
from veneer.method import Adapter, VeneerError
from veneer.methods import DoRA
from veneer.nemo.config import PeftConfig
from veneer.nemo.match import is_linear
from veneer.plan import resolve
from veneer.weights import scan

_LOG = logging.getLogger("veneer.nemo")
_said: list[str] = []


class Factor:
    """A or B of an adapted layer, as if it were a linear layer of its own; `weight` is the trained parameter."""

    bias = None

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.out_features, self.in_features = weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class LinearLoRA(nn.Linear):
    """A linear layer with LoRA; `weight` and `bias` keep their names, and are frozen.

    `LinearLoRA(linear, …)` is an adapted copy of `linear`; `patch_linear_module` adapts the layer itself. Raises
    `VeneerError` for what is no linear layer.
    """

    def __init__(self, orig_linear: nn.Linear, dim: int = 8, alpha: float = 32, dropout: float = 0.0,
                 dropout_position: str = "post", lora_A_init_method: str = "xavier",
                 lora_dtype: torch.dtype | str | None = None, use_dora: bool = False, seed: int | None = None) -> None:
        triton = isinstance(self, TritonLinearLoRA)
        self.__class__ = type(orig_linear)  # type: ignore[assignment]
        self.__dict__.update(copy.deepcopy(orig_linear).__dict__)
        patch_linear_module(self, dim, alpha, dropout, dropout_position, lora_A_init_method, lora_dtype, triton,
                            use_dora, seed)

    def _adapter(self) -> tuple[Adapter, Any]:
        """The first adapter on the weight, and the LoRA in it."""
        adapters: Any = self.adapters
        first = next(iter(adapters.values()))["weight"]
        return first, first.inner if isinstance(first.method, DoRA) else first

    @property
    def lora_A(self) -> Factor:
        return Factor(self._adapter()[1].A)

    @property
    def lora_B(self) -> Factor:
        return Factor(self._adapter()[1].B)

    @property
    def lora_magnitude(self) -> nn.Parameter:
        """DoRA's lengths (out,)."""
        adapter, lora = self._adapter()
        if adapter is lora:
            raise VeneerError("this layer has LoRA and no magnitude; use_dora=True gives it one")
        return adapter.get_parameter("magnitude")

    @property
    def dim(self) -> int:
        return self._adapter()[1].rank

    @property
    def scale(self) -> float:
        return self._adapter()[1].scale

    @property
    def use_dora(self) -> bool:
        adapter, lora = self._adapter()
        return adapter is not lora

    @property
    def dropout_p(self) -> float:
        return self._adapter()[0].dropout

    @property
    def dropout_position(self) -> str:
        return "pre" if self._adapter()[0].dropout_on == "input" else "post"


class TritonLinearLoRA(LinearLoRA):
    """The same with use_triton=True: Veneer's fused op, which is LinearLoRA's too."""


class DenseLoRA(LinearHost, LinearLoRA):
    """Host and view at once, of an ordinary layer."""


class PackedLoRA(PackedHost, LinearLoRA):
    """Host and view at once, of a layer whose weight is held in fewer bits."""


class TritonDenseLoRA(LinearHost, TritonLinearLoRA):
    """`DenseLoRA` under use_triton=True."""


class TritonPackedLoRA(PackedHost, TritonLinearLoRA):
    """`PackedLoRA` under use_triton=True."""


#: host → the host that is a view too, without and with use_triton
_VIEWS: dict[type[Host], tuple[type[Host], type[Host]]] = {
    LinearHost: (DenseLoRA, TritonDenseLoRA), PackedHost: (PackedLoRA, TritonPackedLoRA)}


def show(module: nn.Module, use_triton: bool) -> None:
    """Make an adapted linear layer an instance of LinearLoRA. A layer with a forward of its own stays what it is."""
    if use_triton:
        _say_once()
    if not isinstance(module, Host):
        return
    base, host, *_ = type(module).veneer_key  # type: ignore[attr-defined]
    views = _VIEWS.get(host)
    if views is not None:
        module.become(base, views[use_triton])


def _say_once() -> None:
    if not _said:
        reason = "" if torch.cuda.is_available() else "there is no GPU here; "
        _said.append(reason)
        _LOG.warning("use_triton: %sVeneer's fused op is used (veneer.inspect.explain(model) shows the path of every "
                     "layer)", reason)


def patch_linear_module(orig_linear: nn.Linear, dim: int = 8, alpha: float = 32, dropout: float = 0.0,
                        dropout_position: str = "post", lora_A_init_method: str = "xavier",
                        lora_dtype: torch.dtype | str | None = None, use_triton: bool = True, use_dora: bool = False,
                        seed: int | None = None) -> nn.Linear:
    """Adapt one linear layer in place, and return it: the same object, now a `LinearLoRA`.

    seed: of A; None draws one from torch's generator, so that `torch.manual_seed` decides. Raises `VeneerError` for
    what is no linear layer, is adapted already, or for a value that cannot be.
    """
    config = PeftConfig(dim=dim, alpha=alpha, dropout=dropout, dropout_position=dropout_position,
                        lora_A_init=lora_A_init_method, lora_dtype=lora_dtype, use_triton=use_triton, use_dora=use_dora,
                        match_all_linear=True)
    if not is_linear(orig_linear):
        raise VeneerError(f"patch_linear_module takes a linear layer, got a {type(orig_linear).__name__}")
    weights = scan(orig_linear)
    weight = next(w for w in weights if any(place.param == "weight" for place in w.places))
    made = resolve(orig_linear, weights, {"weight": config.method(weight.dtype)})
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
    attach(orig_linear, made, seed=seed)
    show(orig_linear, use_triton)
    return orig_linear


class LoRATritonFunction:
    """scale · x Aᵀ Bᵀ by itself, for code that calls NeMo's function."""

    @staticmethod
    def apply(x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dtype: torch.dtype | None = None) -> Tensor:
        """x (…, in), lora_A (r, in), lora_B (out, r) → (…, out), computed in `dtype`, or in x's."""
        return Factors(lora_A, lora_B, scale).apply(x if dtype is None else x.to(dtype))
