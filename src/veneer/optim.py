"""Optimizers that know what an adapter's parameters are for: LoRA+ and LoRA-FA.

LoRA+ is a matter of learning rates, so it is a list of parameter groups for any optimizer. LoRA-FA freezes A and
changes the gradient of B, so it is a hook on an optimizer of any class.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from veneer.attached import Attached, adapter_names, attached, shared_states
from veneer.forms import Factors
from veneer.method import VeneerError, nearest

#: the rate of an embedding's adapter where none is given, as in the code of LoRA+'s authors
EMBEDDING_RATE = 1e-6
#: eigenvalues of A·Aᵀ below this share of the largest belong to directions that the rows of A do not have
_CUT = 1e-10


# -- LoRA+ ------------------------------------------------------------------------------------------------
def lora_plus_groups(
    model: nn.Module,
    lr: float,
    ratio: float = 16.0,
    weight_decay: float = 0.0,
    embedding_lr: float | None = None,
    name: str | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of LoRA+ (Hayou et al. 2024, arXiv:2402.12354) for any optimizer: `AdamW(groups)`.

    lr is the rate of the A side, lr·ratio that of the B side, which is what the adapters name in `fast_parameters`.
    All parameters of an embedding's adapter that has these two sides take embedding_lr instead (None: 1e-6, as in the
    authors' code).
    weight_decay is for matrices; vectors (biases, magnitudes, scaling vectors) get none. name: of the adapter; None
    takes all, and at lr whatever else of the model requires a gradient.

    Raises `VeneerError` on a model without adapters, an unknown name, a rate that is none, and where no trained
    parameter lies on the B side.
    """
    if embedding_lr is None:
        embedding_lr = EMBEDDING_RATE
    _check_rates("lora_plus_groups", lr=lr, ratio=ratio, weight_decay=weight_decay, embedding_lr=embedding_lr)
    found = _adapters("lora_plus_groups", model, name)
    rates = {"A": lr, "embedding": embedding_lr, "B": lr * ratio}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {(side, flat): [] for side in rates for flat in (False, True)}
    for parameter, kind in _kinds(model, found, name).items():
        if parameter.requires_grad:
            groups[kind].append(parameter)
    if not groups["B", False] and not groups["B", True]:
        raise VeneerError(_no_fast_side(found))
    return [{"params": parameters, "lr": rates[side], "weight_decay": 0.0 if flat else weight_decay}
            for (side, flat), parameters in groups.items() if parameters]


def _kinds(model: nn.Module, found: list[Attached], name: str | None) -> dict[nn.Parameter, tuple[str, bool]]:
    """Every parameter in question with its side ("A", "B" or "embedding") and whether it is a vector."""
    kinds: dict[nn.Parameter, tuple[str, bool]] = {}
    for _, adapter in found:
        fast = set(adapter.fast_parameters())
        vector = 1 + len(adapter.shape.batch)
        for key, parameter in adapter.named_parameters():
            side = "embedding" if adapter.shape.lookup and fast else "B" if key in fast else "A"
            kinds[parameter] = (side, parameter.dim() <= vector)
    # What many weights share is no part of one embedding, though that embedding's adapter may hold it.
    rest = [p for each in _names(model, name) for state in shared_states(model, each) for p in state.parameters()]
    if name is None:
        rest += [p for p in model.parameters() if p not in kinds]
    return kinds | {parameter: ("A", parameter.dim() <= 1) for parameter in rest}


def _no_fast_side(found: list[Attached]) -> str:
    frozen = [weight.name for weight, adapter in found if adapter.fast_parameters()]
    if frozen:
        return (f"lora_plus_groups: the B side of {frozen[0]!r} and of all other weights is frozen; set its "
                "requires_grad, or there is nothing that the larger rate would be for")
    weight, adapter = found[0]
    return (f"lora_plus_groups: {adapter.method} on {weight.name!r} has no B side (a factor on the side of the outputs "
            f"whose inputs are only the rank), and no other weight of {len(found)} has one, so that LoRA+ would change "
            "nothing; give the optimizer veneer.trainable(model) and one rate")


# -- LoRA-FA ----------------------------------------------------------------------------------------------
def lora_fa(
    model: nn.Module,
    optimizer_class: Callable[..., Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    name: str | None = None,
    **options: Any,
) -> Optimizer:
    """Freeze A and return an optimizer for the rest that sees B's projected gradient (LoRA-FA, Zhang et al. 2023,
    arXiv:2308.03303): gᴮ (A Aᵀ)⁻¹ / s² in place of gᴮ.

    With it a step of plain gradient descent on B moves ΔW = s·B·A by the best approximation of the step that full
    fine-tuning would take, among all changes whose rows A spans. The optimizer is an ordinary one of
    `optimizer_class(parameters, lr=lr, **options)`, whose `step` rewrites the gradients of B in place first, so
    gradients are to be clipped before `step` and made anew after it. A copy of the optimizer does not have this.

    name: of the adapter; None takes all. Raises `VeneerError`, with nothing changed, unless every adapter is a trained
    pair (LoRA, rsLoRA, DoRA around them) with a scale that is not zero.
    """
    _check_rates("lora_fa", lr=lr)
    found = _adapters("lora_fa", model, name)
    pairs = [_pair(item) for item in found]
    fixed = {pair.A for pair in pairs}
    trained = dict.fromkeys(p for _, adapter in found for p in adapter.parameters()
                            if p.requires_grad and p not in fixed)
    if not trained:
        raise VeneerError("lora_fa: every parameter but A is frozen, so there is nothing to train")
    optimizer = optimizer_class(list(trained), lr=lr, **options)
    for A in fixed:
        A.requires_grad_(False)
    optimizer.register_step_pre_hook(_Projection(pairs))
    return optimizer


def _pair(item: Attached) -> Factors:
    """The adapter's A and B, which have to be its own parameters for a gradient of B to mean a change of ΔW."""
    weight, adapter = item
    with torch.no_grad():
        form = adapter.form()
    if not isinstance(form, Factors) or form.mid is not None or form.out is not None or not all(
            isinstance(side, nn.Parameter) for side in (form.A, form.B)):
        raise VeneerError(f"lora_fa: {adapter.method} on {weight.name!r} is no pair ΔW = s·B·A of trained matrices, so "
                          "there is no A to freeze; it is for LoRA(…) and DoRA(LoRA(…)), with residual=\"base\" where "
                          "their start is not zero. To train only some of several adapters, give a name")
    if form.scale == 0:
        raise VeneerError(f"lora_fa: {adapter.method} on {weight.name!r} has a scale of zero")
    return form


class _Projection:
    """The hook: projects the gradient of every B. (A Aᵀ)⁻¹/s² is kept while A is the same numbers."""

    def __init__(self, pairs: list[Factors]) -> None:
        self.pairs = pairs
        self._inverses: dict[Tensor, tuple[tuple, Tensor]] = {}

    def __call__(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self.project()
            return None
        rest = {key: value for key, value in kwargs.items() if key != "closure"}
        return (args[0], functools.partial(self._closure, closure)), rest

    def _closure(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self.project()
        return loss

    @torch.no_grad()
    def project(self) -> None:
        for pair in self.pairs:
            grad = pair.B.grad
            if grad is not None:
                inverse = self._inverse(pair)
                grad.copy_(grad.to(inverse.dtype) @ inverse)

    def _inverse(self, pair: Factors) -> Tensor:
        """(A Aᵀ)⁺ / s² (*batch, r, r), fp32 or wider, on B's device; A Aᵀ has no inverse where rows of A depend."""
        A = pair.A
        state = (A.data_ptr(), A._version, pair.B.device)
        held = self._inverses.get(A)
        if held is None or held[0] != state:
            rows = A.detach().to("cpu", torch.float64)
            inverse = torch.linalg.pinv(rows @ rows.mT, rtol=_CUT, hermitian=True) / pair.scale**2
            held = (state, inverse.to(pair.B.device, torch.promote_types(pair.B.dtype, torch.float32)))
            self._inverses[A] = held
        return held[1]


# -- both -------------------------------------------------------------------------------------------------
def _check_rates(who: str, **values: float) -> None:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise VeneerError(f"{who}: {key} must be a finite number of at least 0, got {value!r}")


def _names(model: nn.Module, name: str | None) -> list[str]:
    return adapter_names(model) if name is None else [name]


def _adapters(who: str, model: nn.Module, name: str | None) -> list[Attached]:
    """The adapters called `name`, or all of the model's."""
    present = adapter_names(model)
    if not present:
        raise VeneerError(f"{who}: this model has no adapter; call veneer.attach(model, …) first")
    if name is not None and name not in present:
        raise VeneerError(f"{who}: no adapter named {name!r} on this model{nearest(str(name), present) or '.'} It has: "
                          f"{', '.join(map(repr, present))}")
    return [item for each in _names(model, name) for item in attached(model, each)]
