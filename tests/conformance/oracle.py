"""The slow truth: the base module's own class applied to a dense new weight, by formulas written in `cells`.

Nothing here calls the code under test: adapter parameters are read by their documented names
`<module>.adapters.<name>.<parameter>.<part>`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

import veneer

from .cells import HostCase, MethodCase, Params


class Result(NamedTuple):
    """An output, and gradients by name: "x" for the input, else the adapter parameters' full names.

    `others` gives the same by other dense arithmetic in the same dtype, where there is one.
    """

    out: Tensor
    grads: dict[str, Tensor]
    others: Callable[[], list[Result]] = list


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
        for key, value in leaves.items():  # what all weights of one adapter share is listed under the first of them
            if ".shared." in key and f".adapters.{name}." in f".{key}":
                mine["shared." + key.rpartition(".shared.")[2]] = value.to(wide)
        added = mine.pop("bias", None)
        found[full] = stored(method.formula(kind)(matrix(W.to(wide), kind), mine), kind, W).to(W.dtype)
        if added is not None:
            bias = full.removesuffix("weight") + "bias"
            old = base.get_parameter(bias).to(wide) if full.count(".") and bias in dict(base.named_parameters()) else 0
            found[bias] = (old + added).to(W.dtype)
    return found


def dense_run(base: nn.Module, method: MethodCase, host: HostCase, params: Params, x: Tensor, cotangent: Tensor | None,
              dtype: torch.dtype, names: Sequence[str | None] = ("default",), by_rows: bool = False,
              cast: bool = False) -> Result:
    """Output and gradients of the base class over dense weights, in `dtype`.

    With one name it is live for the whole batch; with more, each row of the batch goes through its own.
    Adapter parameters keep their own dtypes unless `dtype` is wider. by_rows: every row of the batch by itself, so
    that sums are added up in another order. cast: adapter parameters are rounded to `dtype` where they are used, as
    Veneer's dtype policy has it.
    """
    base = copy.deepcopy(base).to(dtype).requires_grad_(False)
    leaves = {k: p.detach().to(torch.promote_types(p.dtype, dtype)).requires_grad_() for k, p in params.items()}
    used = {k: p.to(dtype) for k, p in leaves.items()} if cast else leaves
    x = x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x
    rows: dict[tuple[str | None, int], list[int]] = {}
    for i in range(x.shape[host.batch_dim]):
        rows.setdefault((names[i] if len(names) > 1 else names[0], i if by_rows else 0), []).append(i)
    outs, order = [], []
    for (name, _), mine in rows.items():
        part = x.index_select(host.batch_dim, torch.tensor(mine))
        outs.append(_apply(base, {} if name is None else dense_weights(base, method, host, used, name), part))
        order += mine
    out = torch.cat(outs, host.batch_dim).index_select(host.batch_dim, torch.argsort(torch.tensor(order)))
    def others() -> list[Result]:
        run = functools.partial(dense_run, base, method, host, dtype=dtype, cotangent=cotangent, names=names)
        noisy = [run(params={k: _rounded(p, dtype, i) for k, p in params.items()}, x=_rounded(x, dtype, i))
                 for i in range(8)]
        return [run(params=params, x=x, by_rows=True), run(params=params, x=x, cast=True), *noisy]

    if cotangent is None:
        return Result(out.detach(), {}, others)
    wanted = {**leaves, **({"x": x} if x.is_floating_point() else {})}
    grads = torch.autograd.grad(out, list(wanted.values()), cotangent.to(dtype), allow_unused=True)
    return Result(out.detach(), {k: torch.zeros_like(wanted[k]) if g is None else g
                                 for k, g in zip(wanted, grads, strict=True)}, others)


def _rounded(tensor: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """With a relative error of up to half a unit in the last place of `dtype` in every element."""
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(seed)
    noise = 1 + (torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5) * torch.finfo(dtype).eps
    return (tensor.detach().double() * noise).to(torch.promote_types(tensor.dtype, dtype))


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

    Dense arithmetic now and then rounds to the truth by luck, above all in sums of terms that cancel; so where it
    seems better, it is asked again: adding up in another order, with the adapter's numbers cast at use, and with
    half a unit in the last place of noise on what goes in, eight times, which is how far no arithmetic can tell the
    result. The worst of these counts. The floor is one unit in the last place of a 16-bit type, and the few by which
    two orders of the same sum differ in fp32 (gradients through a softmax of three tokens need two) and fp64, where
    the truth itself is rounded in every step.
    """
    assert got.grads.keys() == own.grads.keys() == truth.grads.keys()
    floor = torch.finfo(dtype).eps * {torch.float64: 32, torch.float32: 4}.get(dtype, 1)
    mine, theirs, true = _parts(got), [_parts(own)], _parts(truth)
    for what in mine:
        assert mine[what].shape == true[what].shape, f"{what}: {tuple(mine[what].shape)}, not {tuple(true[what].shape)}"
        if not true[what].any():
            assert not mine[what].any(), f"{what} must be zero"
            continue
        off = error(mine[what], true[what])
        if off > 2 * max(error(t[what], true[what]) for t in theirs) + floor and len(theirs) == 1:
            theirs += [_parts(other) for other in own.others()]
        worst = max(error(t[what], true[what]) for t in theirs)
        assert off <= 2 * worst + floor, f"{what}: error {off:.3g}, dense {dtype} has {worst:.3g}"


def _parts(result: Result) -> dict[str, Tensor]:
    return {"output": result.out, **{f"gradient of {k}": g for k, g in result.grads.items()}}
