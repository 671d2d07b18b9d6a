"""The pass over the data: batches through the bare base, with collectors' hooks on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach import disabled
from veneer.attached import hosts
from veneer.calibration.collect import Collector
from veneer.calibration.rows import Masking, Masks
from veneer.method import VeneerError

Forward = Callable[[nn.Module, Any], Any]


class Pass:
    """Runs one batch after the other through the model, with the collectors' hooks on it."""

    def __init__(self, net: nn.Module, forward: Forward, mask: Masking, collectors: Mapping[str, Collector]) -> None:
        self.net, self.forward, self.mask, self.collectors = net, forward, mask, list(collectors.values())
        self.device = next((p.device for p in net.parameters() if not p.is_meta), torch.device("cpu"))
        self.batches = self.tokens = 0
        self.masked = False
        self.wants_loss = any(c.wants_loss for c in self.collectors)

    def run(self, batch: Any) -> None:
        batch = _moved(batch, self.device)
        masks = Masks.of(self.mask(batch))
        self.batches += 1
        self.masked |= masks.tokens is not None
        if masks.tokens == 0:
            return
        weight = _length(batch) if masks.tokens is None else masks.tokens
        self.tokens += weight
        for collector in self.collectors:
            collector.masks, collector.weight = masks, float(weight)
        with torch.set_grad_enabled(self.wants_loss):
            output = self.forward(self.net, batch)
            if self.wants_loss:
                _loss(output, self.batches).backward()
        for collector in self.collectors:
            collector.end_batch()

    def note(self) -> str:
        counts = [(c.unsettled(), len(c.entries)) for c in self.collectors]
        return "".join(f"{total - len(left)} of {total} settled, " for left, total in counts if left is not None)

    def settled(self) -> bool:
        """Another batch would change nothing."""
        return all(collector.unsettled() == [] for collector in self.collectors)


@contextlib.contextmanager
def watched(run: Pass) -> Iterator[None]:
    """With hooks on the bare base in evaluation mode, no parameter wanting a gradient; everything as it was after."""
    below = [part for _, host in hosts(run.net) for part in host.adapters.modules()]  # a face may hide them
    training = [(module, module.training) for module in (*run.net.modules(), *below)]
    wanting = [param for param in run.net.parameters() if param.requires_grad]
    hooks: list[Any] = []
    try:
        with disabled(run.net):
            run.net.eval()
            for param in wanting:
                param.requires_grad_(False)
            hooks += [hook for collector in run.collectors for hook in collector.watch()]
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for param in wanting:
            param.requires_grad_(True)
        for module, flag in training:
            module.training = flag


def _loss(output: Any, batch: int) -> Tensor:
    loss = output if isinstance(output, Tensor) else \
        output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(output).__name__} without one"
        raise VeneerError(f"calibrate: a start from gradients needs a loss, and the forward gave {what}. Put labels "
                          "into the batches, or give forward=lambda model, batch: loss")
    if not torch.isfinite(loss):
        raise VeneerError(f"calibrate: the loss of batch {batch} is {loss.item()}")
    if not loss.requires_grad:
        raise VeneerError("calibrate: the loss does not depend on any of the weights whose gradients are wanted")
    return loss


def call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_moved(value, device) for value in batch]
    return batch


def _length(batch: Any) -> int:
    """How much a batch without a mask weighs: its positions where it is token ids (whole numbers, two dimensions), else
    its examples; 1 where it does not say."""
    if isinstance(batch, Tensor):
        tokens = batch.dim() == 2 and not batch.is_floating_point() and batch.dtype != torch.bool
        return batch.numel() if tokens else len(batch) if batch.dim() else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return next((_length(part) for part in parts if isinstance(part, Tensor) and part.dim()), 1)
