"""The statistic "gradient": of the loss with respect to a weight, as Σ dYᵀX over the layer's outputs and inputs.

No weight needs a gradient of its own for this, so that it works however the weight is stored, and autograd keeps
nothing of a weight's size. A layer's input is held from its forward to its backward, which is where its part of the
sum is made and the input let go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.calibration.rows import grouped_outputs, grouped_rows
from veneer.leading import triplets, wide
from veneer.method import Shape, VeneerError, without_autocast


@dataclass
class Gradient:
    """Σ weightᵢ · Gᵢ (out, in) in fp32 over batches, and Σ weightᵢ."""

    name: str
    shape: Shape
    hold: torch.device | str | None = None
    sum: Tensor | None = None

    def add(self, module: nn.Module, x: Tensor, dy: Tensor, weight: float) -> None:
        """With what one call of the layer gives: its input x and the gradient of its output."""
        X = grouped_rows(x, self.shape, module).to(torch.float32)
        dY = grouped_outputs(dy, self.shape, module).to(torch.float32)
        with without_autocast(X):
            made = torch.einsum("ngo,ngi->goi", dY, X).reshape(self.shape.out, self.shape.in_).mul_(weight)
        if not torch.isfinite(made).all():
            raise VeneerError(f"calibrate: the gradient of {self.name!r} is not finite in this batch")
        made = made if self.hold is None else made.to(self.hold)
        self.sum = made if self.sum is None else self.sum.add_(made)

    def watch(self, module: nn.Module, weight: Callable[[], float]) -> list[Any]:
        """Hooks on one layer that has the weight. weight: gives the weight of the batch that is going on."""
        def on_output(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            x = first_tensor(args, kwargs)
            if x is not None and isinstance(output, Tensor) and output.requires_grad:
                self._await(module, x, output, weight)

        return [module.register_forward_pre_hook(_wants_gradient, with_kwargs=True),
                module.register_forward_hook(on_output, with_kwargs=True)]

    def _await(self, module: nn.Module, x: Tensor, output: Tensor, weight: Callable[[], float]) -> None:
        version = x._version

        def back(dy: Tensor) -> None:
            if x._version != version:
                raise VeneerError(f"calibrate: the input of {self.name!r} is changed in place after its forward, so "
                                  "that its gradient cannot be told; leave this weight out")
            with torch.no_grad():
                self.add(module, x.detach(), dy, weight())

        output.register_hook(back)

    def evidence(self, total: float, most: int | None) -> dict[str, Tensor]:
        """count () = `total`, and the mean gradient (out, in), or its `most` leading singular triplets: left (out, k),
        singular (k,), right (k, in), with fewer where its rank is smaller. On the CPU; what was held is let go."""
        assert self.sum is not None
        mean, self.sum = self.sum.div_(total), None
        count = torch.tensor(total)
        if most is None:
            return {"gradient": mean.cpu(), "count": count}
        return {**_named(*triplets(mean, most)), "count": count, "sought": torch.tensor(most)}


def _named(left: Tensor, singular: Tensor, right: Tensor) -> dict[str, Tensor]:
    return {"left": left.float().cpu().contiguous(), "singular": singular.float().cpu(),
            "right": right.float().cpu().contiguous()}


def first_tensor(args: tuple, kwargs: dict) -> Tensor | None:
    """A layer's input, given by position or by name."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _wants_gradient(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The first adapted layer's input needs a gradient, or there would be none of its output."""
    x = first_tensor(args, kwargs)
    if x is None or x.requires_grad or not x.is_floating_point():
        return None
    # The output then is no leaf, and what follows may change it in place.
    new = x.detach().requires_grad_()
    return (tuple(new if a is x else a for a in args), {k: new if a is x else a for k, a in kwargs.items()})


def merged(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean over all batches behind several of these statistics; of triplets, that of the ranks they have."""
    count = torch.stack([part["count"] for part in parts]).sum()
    share = [float(part["count"] / count) for part in parts]
    if all("gradient" in part for part in parts):
        mean = sum(s * part["gradient"] for s, part in zip(share, parts, strict=True))
        return {"gradient": mean, "count": count}  # type: ignore[dict-item]
    if any("gradient" in part for part in parts):
        raise VeneerError("whole gradients and leading triplets of gradients cannot be merged; calibrate with the same "
                          "`compress` everywhere")
    most = max(int(part["sought"]) for part in parts)
    left = torch.cat([s * wide(p["left"]) * wide(p["singular"]) for s, p in zip(share, parts, strict=True)], 1)
    right = torch.cat([wide(part["right"]) for part in parts])
    # QR of both sides: the singular values of the sum are those of the product of two small triangles.
    (outer, down), (inner, across) = torch.linalg.qr(left), torch.linalg.qr(right.mT)
    U, values, V = triplets(down @ across.mT, most)
    return {**_named(outer @ U, values, V @ inner.mT), "count": count, "sought": torch.tensor(most)}
