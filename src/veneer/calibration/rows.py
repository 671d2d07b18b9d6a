"""A layer's input as rows that multiply its weight, and which of them count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.method import Shape, VeneerError

#: batch → one mask, several for inputs of several shapes (the first that fits is taken), or None = every position
Masking = Callable[[Any], Tensor | Sequence[Tensor] | None]

_IGNORED = -100


def label_mask(batch: Any) -> list[Tensor]:
    """The positions whose label is not -100 and that are no padding; where there are no labels of that shape, those
    that are no padding. Labels of one number per example (classes) say nothing about positions."""
    masks = attention_mask(batch)
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point():
        return masks
    learnt = labels != _IGNORED
    for padding in masks:
        if padding.shape == learnt.shape:
            learnt = learnt & padding.to(learnt.device)
    return [learnt, *masks]


def attention_mask(batch: Any) -> list[Tensor]:
    """The positions that are no padding, for the decoder of a pair of models first."""
    if not isinstance(batch, Mapping):
        return []
    found = [batch.get(name) for name in ("decoder_attention_mask", "attention_mask")]
    return [mask.bool() for mask in found if isinstance(mask, Tensor) and mask.dim() == 2]


class Masks(NamedTuple):
    """The masks of one batch, those that leave nothing out taken away."""

    masks: list[Tensor]
    tokens: int | None  #: how many positions the first mask keeps; None without one

    @classmethod
    def of(cls, given: Any) -> Masks:
        """From what a `Masking` gave; `VeneerError` for anything but boolean tensors."""
        masks = [] if given is None else [given] if isinstance(given, Tensor) else list(given)
        for mask in masks:
            if not isinstance(mask, Tensor) or mask.is_floating_point():
                raise VeneerError(f"calibrate: mask must give a boolean tensor, a list of them or None, got {mask!r}")
        masks = [mask.bool() for mask in masks]
        return cls([m for m in masks if not bool(m.all())], int(masks[0].sum()) if masks else None)

    def pick(self, x: Tensor) -> tuple[Tensor, bool]:
        """The rows (n, in) of an input (…, in) that count, and whether a mask that fits was found or none was needed.

        A mask fits an input whose leading dimensions are its own, flattened or not. An input of one row per example
        (what a pooler gives) has no positions to leave out.
        """
        rows = x.reshape(-1, x.shape[-1])
        for mask in self.masks:
            if mask.shape == x.shape[:-1] or (x.dim() == 2 and mask.numel() == len(x)):
                return rows[mask.reshape(-1).to(x.device)], True
        pooled = x.dim() == 2 and any(len(x) == len(mask) for mask in self.masks)
        return rows, pooled or not self.masks


def grouped_rows(x: Tensor, shape: Shape, module: nn.Module) -> Tensor:
    """The input of a layer as (n, groups, in), for a weight of `shape`; groups is 1 but for grouped convolutions."""
    if not shape.kernel:
        return x.reshape(-1, 1, shape.in_)
    conv = cast(Any, module)
    dims, groups = len(shape.kernel), conv.groups
    if x.dim() == dims + 1:
        x = x.unsqueeze(0)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    for i, (size, step, gap) in enumerate(zip(shape.kernel, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + i, (size - 1) * gap + 1, step)[..., ::gap]
    # (B, C, places…, kernel…) → every place a row, of one group's channels and kernel positions
    x = x.movedim(1, 1 + dims).flatten(0, dims)
    return x.reshape(len(x), groups, shape.in_)


def grouped_outputs(y: Tensor, shape: Shape, module: nn.Module) -> Tensor:
    """The output of a layer, or its gradient, as (n, groups, out / groups), row by row what `grouped_rows` gives."""
    if not shape.kernel:
        return y.reshape(-1, 1, shape.out)
    if y.dim() == len(shape.kernel) + 1:
        y = y.unsqueeze(0)
    return y.movedim(1, -1).reshape(-1, cast(Any, module).groups, shape.out // cast(Any, module).groups)


def counted_rows(x: Tensor, shape: Shape, module: nn.Module, masks: Masks) -> tuple[Tensor, bool]:
    """The rows (n, in) of a layer's input that count, in fp32, and whether the masks could be applied."""
    if shape.kernel:
        rows, fits = grouped_rows(x, shape, module).reshape(-1, shape.in_), not masks.masks
    else:
        rows, fits = masks.pick(x)
    return rows.detach().to(torch.float32), fits
