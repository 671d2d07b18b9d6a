"""Where a layer has the rows of the batch, and refusals where it cannot tell them apart.

Rows are told apart along dimension 0 of what a layer is given. Where that is known not to be the batch, a
route with several rows is refused: it would give rows to the wrong adapters in silence.
"""

from __future__ import annotations

from veneer.hosts.base import Host
from veneer.method import VeneerError
from veneer.route import Route

SEQUENCE_FIRST = "sequence first"


class SequenceFirst:
    """The mark on a host below a layer that works on (sequence, batch, width)."""

    def remove(self) -> None:
        """Nothing to undo: the mark goes with the host's state."""


def refuse_sequence_first(host: Host, route: Route) -> None:
    """Raise `VeneerError` where several rows are routed through a layer whose dimension 0 is the sequence."""
    if SEQUENCE_FIRST in host.veneer.guards and rows_routed(route) > 1:
        raise VeneerError("route(): this layer sees (sequence, batch, width) and cannot tell the rows of the batch "
                          "apart; build its transformer layer with batch_first=True")


def refuse_unbatched(route: Route, dims: int, least: int, what: str) -> None:
    """Raise `VeneerError` where several rows are routed through an input of fewer than `least` dimensions."""
    if dims < least and rows_routed(route) > 1:
        raise VeneerError(f"route() was given {rows_routed(route)} names, but {what} of {dims} dimensions has no "
                          f"batch: it needs {least} dimensions, of which the first is the batch")


def rows_routed(route: Route) -> int:
    return len(route.rows.names) if route.rows is not None else 1
