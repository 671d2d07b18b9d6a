"""Collectors: hooks on the layers that have the weights, and what they gather batch by batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Generic

import torch
from torch import Tensor, nn

from veneer.calibration.covariance import Covariance
from veneer.calibration.gradients import Gradient, first_tensor
from veneer.calibration.inputs import Inputs
from veneer.calibration.rows import Masks, counted_rows
from veneer.calibration.streams import S, Streams
from veneer.method import Method, Need, Shape, VeneerError
from veneer.plan import PlanEntry

Device = torch.device | str


class Collector:
    """Gathers one kind of statistic of some weights. `wants_loss`: by a backward pass from the loss."""

    wants_loss = False

    def __init__(self, entries: Mapping[str, PlanEntry], hold: Device | None) -> None:
        self.entries, self.hold = dict(entries), hold
        self.masks, self.weight = Masks([], None), 1.0
        #: weights whose input the masks did not fit
        self.unmasked: list[str] = []

    def watch(self) -> list[Any]:
        """Put hooks on the layers; what is returned takes them off."""
        raise NotImplementedError(f"{type(self).__name__} must define watch")

    def end_batch(self) -> None:
        """What is due after each batch."""

    def unseen(self) -> list[str]:
        """Weights of which nothing was gathered."""
        raise NotImplementedError(f"{type(self).__name__} must define unseen")

    def unsettled(self) -> list[str] | None:
        """Weights that another batch may still change; None where every batch counts."""
        return None

    def evidence(self, compress: bool) -> dict[str, dict[str, Tensor]]:
        """The statistics by weight; what they are made of is let go."""
        raise NotImplementedError(f"{type(self).__name__} must define evidence")


class InputCollector(Collector, Generic[S]):
    """A statistic of inputs, one for all weights that are given the same."""

    def __init__(self, entries: Mapping[str, PlanEntry], hold: Device | None) -> None:
        super().__init__(entries, hold)
        self.streams: Streams[S] = Streams()

    def empty(self, shape: Shape, need: Need, device: Device) -> S:
        """The statistic of no inputs."""
        raise NotImplementedError(f"{type(self).__name__} must define empty")

    def watch(self) -> list[Any]:
        hooks = []
        for name, entry in self.entries.items():
            need = entry.method.need
            assert need is not None
            for place in entry.weight.places:
                hook = self._hook(name, place.layout.shape, need)
                hooks.append(place.module.register_forward_pre_hook(hook, with_kwargs=True))
        return hooks

    def _hook(self, name: str, shape: Shape, need: Need) -> Callable[[nn.Module, tuple, dict], None]:
        def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = first_tensor(args, kwargs)
            if x is not None:
                with torch.no_grad():
                    self.streams.see(name, x, (need, shape.in_, shape.kernel and id(module)),
                                     lambda: self.empty(shape, need, x.device), lambda: self._rows(name, x, module))

        return see

    def _rows(self, name: str, x: Tensor, module: nn.Module) -> Tensor:
        rows, fits = counted_rows(x, self.entries[name].weight.layout.shape, module, self.masks)
        if not torch.isfinite(rows).all():
            raise VeneerError(f"calibrate: the input of {name!r} holds NaN or infinite values")
        if not fits and name not in self.unmasked:
            self.unmasked.append(name)
        return rows

    def end_batch(self) -> None:
        self.streams.end_forward()

    def unseen(self) -> list[str]:
        return [name for name in self.entries if name not in self.streams.of or not self.streams.of[name].state.seen]

    def evidence(self, compress: bool) -> dict[str, dict[str, Tensor]]:
        made: dict[int, dict[str, Tensor]] = {}
        found = {}
        for name in self.entries:
            stream = self.streams.of.pop(name)
            if id(stream) not in made:
                made[id(stream)] = stream.state.evidence()
            found[name] = made[id(stream)]
        return found


class ComponentCollector(InputCollector[Inputs]):
    """Principal components. A stream is left alone once all that is used of it has settled."""

    def empty(self, shape: Shape, need: Need, device: Device) -> Inputs:
        return Inputs.empty(shape.in_, need.directions, device)

    def end_batch(self) -> None:
        super().end_batch()
        used = self._used()
        settled: dict[int, list[bool]] = defaultdict(list)
        for name, stream in self.streams.of.items():
            need = self.entries[name].method.need
            assert need is not None
            settled[id(stream)].append(stream.state.settled(used[name], need.tau))
        for stream in self.streams.distinct():
            stream.done = all(settled[id(stream)])

    def _used(self) -> dict[str, int]:
        """How many components each weight would use if this were all; what its method says, while ranks cannot be
        dealt out yet."""
        used, groups = {}, defaultdict(list)
        for name, entry in self.entries.items():
            assert entry.method.need is not None
            used[name] = entry.method.need.used
            groups[entry.method].append(name)
        for method, names in groups.items():
            streams = [self.streams.of.get(name) for name in names]
            if all(stream is not None and stream.state.full() for stream in streams):
                used |= self._dealt(method, names)
        return used

    def _dealt(self, method: Method, names: list[str]) -> dict[str, int]:
        parts = method.portioned({name: self.streams.of[name].state.current() for name in names})
        return {name: 0 if part is None or part.need is None else part.need.used for name, part in parts.items()}

    def unsettled(self) -> list[str]:
        return [name for name in self.entries if name not in self.streams.of or not self.streams.of[name].done]


class CovarianceCollector(InputCollector[Covariance]):
    """XᵀX."""

    def empty(self, shape: Shape, need: Need, device: Device) -> Covariance:
        return Covariance.empty(shape.in_, self.hold or device)


class GradientCollector(Collector):
    """The mean gradient."""

    wants_loss = True

    def __init__(self, entries: Mapping[str, PlanEntry], hold: Device | None) -> None:
        super().__init__(entries, hold)
        self.total = 0.0
        self.sums = {name: Gradient(name, e.weight.layout.shape, hold) for name, e in entries.items()}

    def watch(self) -> list[Any]:
        return [hook for name, entry in self.entries.items() for place in entry.weight.places
                for hook in self.sums[name].watch(place.module, lambda: self.weight)]

    def end_batch(self) -> None:
        self.total += self.weight

    def unseen(self) -> list[str]:
        return [name for name, found in self.sums.items() if found.sum is None or not bool(found.sum.any())]

    def evidence(self, compress: bool) -> dict[str, dict[str, Tensor]]:
        found = {}
        for name, entry in self.entries.items():
            need = entry.method.need
            assert need is not None
            found[name] = self.sums[name].evidence(self.total, need.directions if compress else None)
        return found


COLLECTORS: dict[str, type[Collector]] = {
    "inputs": ComponentCollector, "covariance": CovarianceCollector, "gradient": GradientCollector}
