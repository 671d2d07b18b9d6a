"""One statistic for all weights that are given the same inputs (the projections to queries, keys and values, say).

A *stream* is a sequence of input tensors and the statistic of all of them. Weights that were given the very same
tensors follow one stream. Whoever is the first to be given a tensor adds it; the others only walk past it. A weight
that is given something else leaves for a stream of its own, which starts from the statistic as it was before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from torch import Tensor


class Statistic(Protocol):
    """What a stream keeps; never changed, so that an earlier one can be gone back to."""

    @property
    def seen(self) -> int: ...

    def add(self: S, rows: Tensor) -> S: ...

    def evidence(self) -> dict[str, Tensor]: ...


S = TypeVar("S", bound=Statistic)


class _Passed(Generic[S]):
    """One tensor of the forward that is going on, and the statistic before it (None once all members are past it)."""

    def __init__(self, x: Tensor, before: S) -> None:
        self.ref, self.version = weakref.ref(x), _version(x)
        self.before: S | None = before

    def is_of(self, x: Tensor) -> bool:
        return self.ref() is x and self.version == _version(x)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


@dataclass(eq=False)
class Stream(Generic[S]):
    """`at`: member → how many tensors of this forward it has been given."""

    state: S
    kind: object
    at: dict[str, int] = field(default_factory=dict)
    passed: list[_Passed[S]] = field(default_factory=list)
    #: it began in this forward, so that a weight not seen before may still join it
    new: bool = True
    #: its statistic has settled: nothing is added for now
    done: bool = False


class Streams(Generic[S]):
    """The stream of every weight, by its name."""

    def __init__(self) -> None:
        self.of: dict[str, Stream[S]] = {}

    def distinct(self) -> list[Stream[S]]:
        return list(dict.fromkeys(self.of.values()))

    def see(self, name: str, x: Tensor, kind: object, empty: Callable[[], S], rows: Callable[[], Tensor]) -> None:
        """A weight is given x. kind: only weights of equal kind may follow one stream; empty: a statistic of nothing;
        rows: x as rows, asked for only where it is added."""
        stream = self.of.get(name)
        if stream is None:
            stream = self._enter(name, self._fitting(x, kind) or Stream(empty(), kind))
        if stream.done:
            return
        at = stream.at[name]
        if at < len(stream.passed):
            if stream.passed[at].is_of(x):
                stream.at[name] += 1
                _forget(stream)
                return
            stream = self._leave(name)
        stream.passed.append(_Passed(x, stream.state))
        stream.state = stream.state.add(rows())
        stream.at[name] += 1
        _forget(stream)

    def end_forward(self) -> None:
        """A member that was not given all that its stream has taken in leaves it."""
        for name, stream in list(self.of.items()):
            if stream.at[name] < len(stream.passed):
                self._leave(name)
        for stream in self.distinct():
            stream.passed.clear()
            stream.at = dict.fromkeys(stream.at, 0)
            stream.new = False

    def _fitting(self, x: Tensor, kind: object) -> Stream[S] | None:
        """A stream of which x is all there was so far."""
        return next((s for s in self.distinct() if s.new and s.kind == kind and len(s.passed) == 1
                     and s.passed[0].is_of(x)), None)

    def _enter(self, name: str, stream: Stream[S]) -> Stream[S]:
        self.of[name] = stream
        stream.at[name] = 0
        return stream

    def _leave(self, name: str) -> Stream[S]:
        old = self.of[name]
        before = old.passed[old.at.pop(name)].before
        assert before is not None
        return self._enter(name, Stream(before, old.kind, new=False))


def _forget(stream: Stream) -> None:
    """Statistics that no member needs to go back to any more."""
    least = min(stream.at.values())
    for passed in stream.passed[:least]:
        passed.before = None
