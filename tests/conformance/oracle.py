"""The slow truth: the base module's own class applied to a dense new weight, by formulas written in `cells`.

Nothing here calls the code under test: adapter parameters are read by their documented names
`<module>.adapters.<name>.<parameter>.<part>`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

import veneer

from .cells import HostCase, MethodCase, Params


class Result(NamedTuple):
    """An output, and gradients by name: "x" for the input, else the adapter parameters' full names."""

    out: Tensor
    grads: dict[str, Tensor]


def build(host: HostCase, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    with torch.random.fork_rng():
        torch.set_default_dtype(torch.float64)
        try:
            model = host.build()
        finally:
            torch.set_default_dtype(torch.float32)
    return model.to(dtype)


def inputs(host: HostCase, dtype: torch.dtype, rows: int = 5) -> Tensor:
    x = host.input(rows)
    return x.to(dtype).requires_grad_() if x.is_floating_point() else x


def adapt(model: nn.Module, method: MethodCase, host: HostCase, name: str = "default",
          randomise: bool = True) -> nn.Module:
    veneer.attach(model, dict.fromkeys(host.patterns, method.method), name=name)
    if randomise:
        scatter(model, name)
    return model


@torch.no_grad()
def scatter(model: nn.Module, name: str = "default") -> None:
    """Move every parameter of an adapter by about a tenth."""
    for param in adapter_parameters(model, name).values():
        param.add_(torch.randn(param.shape, dtype=torch.float64).mul_(0.1).to(param.dtype))


def adapter_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    return {full: p for full, p in model.named_parameters() if f".adapters.{name}." in f".{full}"}


def matrix(weight: Tensor, kind: str) -> Tensor:
    if kind == "conv":
        return weight.flatten(1)
    if kind == "vector":
        return weight.unsqueeze(-1)
    return weight.mT if kind == "transposed" else weight


def stored(new: Tensor, kind: str, like: Tensor) -> Tensor:
    return (new.mT if kind == "transposed" else new).reshape(like.shape)


def parts(leaves: Params, full: str, name: str) -> Params:
    """The adapter parameters of one base parameter `full`, by their short names."""
    module, _, param = full.rpartition(".")
    prefix = f"{module + '.' if module else ''}adapters.{name}.{param}."
    return {key.removeprefix(prefix): value for key, value in leaves.items() if key.startswith(prefix)}


def dense_weights(base: nn.Module, method: MethodCase, host: HostCase, leaves: Params, name: str = "default") -> Params:
    """The adapted base parameters by full name, computed in fp32 or wider and rounded once."""
    kinds = dict(host.weights)
    if method.covers_bias:
        kinds.update(dict.fromkeys(host.biases, "vector"))
    found = {}
    for full, kind in kinds.items():
        W = base.get_parameter(full).detach()
        wide = torch.promote_types(W.dtype, torch.float32)
        mine = {key: value.to(wide) for key, value in parts(leaves, full, name).items()}
        assert mine, f"no adapter parameters for {full} among {list(leaves)}"
        added = mine.pop("bias", None)
        found[full] = stored(method.formula(kind)(matrix(W.to(wide), kind), mine), kind, W).to(W.dtype)
        if added is not None:
            bias = full.removesuffix("weight") + "bias"
            old = base.get_parameter(bias).to(wide) if full.count(".") and bias in dict(base.named_parameters()) else 0
            found[bias] = (old + added).to(W.dtype)
    return found


def dense_run(base: nn.Module, method: MethodCase, host: HostCase, params: Params, x: Tensor, cotangent: Tensor | None,
              dtype: torch.dtype, names: Sequence[str | None] = ("default",)) -> Result:
    """Output and gradients of the base class over dense weights, in `dtype`.

    With one name it is live for the whole batch; with more, each row of the batch goes through its own.
    Adapter parameters keep their own dtypes unless `dtype` is wider.
    """
    base = copy.deepcopy(base).to(dtype).requires_grad_(False)
    leaves = {k: p.detach().to(torch.promote_types(p.dtype, dtype)).requires_grad_() for k, p in params.items()}
    x = x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x
    rows: dict[str | None, list[int]] = {}
    for i in range(x.shape[host.batch_dim]):
        rows.setdefault(names[i] if len(names) > 1 else names[0], []).append(i)
    outs, order = [], []
    for name, mine in rows.items():
        part = x.index_select(host.batch_dim, torch.tensor(mine))
        outs.append(_apply(base, {} if name is None else dense_weights(base, method, host, leaves, name), part))
        order += mine
    out = torch.cat(outs, host.batch_dim).index_select(host.batch_dim, torch.argsort(torch.tensor(order)))
    if cotangent is None:
        return Result(out.detach(), {})
    wanted = {**leaves, **({"x": x} if x.is_floating_point() else {})}
    grads = torch.autograd.grad(out, list(wanted.values()), cotangent.to(dtype), allow_unused=True)
    return Result(out.detach(), {k: torch.zeros_like(wanted[k]) if g is None else g
                                 for k, g in zip(wanted, grads, strict=True)})


def _apply(base: nn.Module, new: Params, x: Tensor) -> Tensor:
    known = dict(base.named_parameters(remove_duplicate=False))
    missing = [key for key in new if key not in known]
    if missing:  # a bias that an adapter brings to a layer without one
        base = copy.deepcopy(base)
        for key in missing:
            owner, _, param = key.rpartition(".")
            base.get_submodule(owner).register_parameter(param, nn.Parameter(torch.zeros_like(new[key])))
    return functional_call(base, new, (x,))


def live_run(model: nn.Module, params: Params, x: Tensor, cotangent: Tensor | None) -> Result:
    """The same from the model under test."""
    if cotangent is None:
        with torch.no_grad():
            return Result(model(x), {})
    x = x.detach().requires_grad_() if x.is_floating_point() else x
    for param in model.parameters():
        param.grad = None
    out = model(x)
    out.backward(cotangent.to(out.dtype))
    frozen = [k for k, p in model.named_parameters() if p.grad is not None and ".adapters." not in f".{k}"]
    assert not frozen, f"gradients reached the frozen base: {frozen}"
    grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in params.items()}
    return Result(out.detach(), {**grads, **({"x": x.grad} if x.is_floating_point() else {})})


def error(got: Tensor, truth: Tensor) -> float:
    """‖got − truth‖ / ‖truth‖ in fp64 (Frobenius)."""
    difference = torch.linalg.vector_norm(got.double() - truth.double())
    return float(difference / torch.linalg.vector_norm(truth.double()).clamp_min(1e-300))


def assert_as_good(got: Result, own: Result, truth: Result, dtype: torch.dtype) -> None:
    """Every part of `got` is nearer to the fp64 truth than twice what dense arithmetic in the same dtype is.

    The floor is for where that arithmetic happens to round to the truth: one unit in the last place of a 16-bit
    type, and the few by which two orders of the same sum differ in fp32 (gradients through a softmax of three
    tokens need two) and fp64, where the truth itself is rounded in every step.
    """
    assert got.grads.keys() == own.grads.keys() == truth.grads.keys()
    pairs = {"output": (got.out, own.out, truth.out),
             **{f"gradient of {k}": (got.grads[k], own.grads[k], truth.grads[k]) for k in got.grads}}
    floor = torch.finfo(dtype).eps * {torch.float64: 32, torch.float32: 4}.get(dtype, 1)
    for what, (mine, theirs, true) in pairs.items():
        assert mine.shape == true.shape, f"{what}: shape {tuple(mine.shape)}, not {tuple(true.shape)}"
        if not true.any():
            assert not mine.any(), f"{what} must be zero"
            continue
        assert error(mine, true) <= 2 * error(theirs, true) + floor, (
            f"{what}: error {error(mine, true):.3g}, dense {dtype} has {error(theirs, true):.3g}")
