"""A progress line on a terminal, in plain text."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 24


class Progress:
    """Rewrites one line of stderr; silent where that is no terminal, or where it is not wanted."""

    def __init__(self, total: int | None, wanted: bool, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.total, self.shown = total, wanted and self.stream.isatty()
        self.start, self.length = time.monotonic(), 0

    def step(self, done: int, note: str) -> None:
        if not self.shown:
            return
        bar = ""
        if self.total:
            full = min(_WIDTH, _WIDTH * done // self.total)
            bar = f"[{'=' * full}{' ' * (_WIDTH - full)}] {done}/{self.total} batches"
        text = f"calibrate {bar or f'{done} batches'}, {note}{time.monotonic() - self.start:.0f} s"
        self.stream.write("\r" + text.ljust(self.length))
        self.stream.flush()
        self.length = len(text)

    def close(self) -> None:
        if self.shown and self.length:
            self.stream.write("\n")
            self.stream.flush()
