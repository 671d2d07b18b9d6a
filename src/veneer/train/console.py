"""What the user sees: a live bar on a terminal, plain lines elsewhere, and only from the first process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from veneer.train.extras import require

_LINE_EVERY = 10.0  # seconds between two lines where no live bar can be drawn


def is_first_process() -> bool:
    """True in a single process and in rank 0 of a torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


class Console:
    """Prints, tables and progress, through rich."""

    def __init__(self) -> None:
        rich_console = require("rich.console", "veneer's training command")
        self.rich = rich_console.Console(highlight=False, soft_wrap=True, quiet=not is_first_process())

    def say(self, text: str = "", style: str = "") -> None:
        self.rich.print(text, style=style or None, markup=False)

    def heading(self, text: str) -> None:
        self.rich.print()
        self.rich.print(text, style="bold", markup=False)

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        tables, text = require("rich.table", "printing a table"), require("rich.text", "printing a table")
        table = tables.Table(*header, header_style="bold", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(text.Text(cell) for cell in row))
        self.rich.print(table)

    def pieces(self, pieces: list[tuple[str, bool]]) -> None:
        """An example, what carries loss set off in green and between ⟦ ⟧."""
        text = require("rich.text", "printing an example").Text()
        for piece, trained in pieces:
            text.append(f"⟦{piece}⟧" if trained else piece, style="bold green" if trained else "dim")
        self.rich.print(text)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Bar]:
        bar = Bar(self, what, total)
        try:
            yield bar
        finally:
            bar.close()


class Bar:
    """Progress of one job: a live bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, console: Console, what: str, total: int) -> None:
        self.console, self.what, self.total, self.done, self.note = console, what, total, 0, ""
        self._start = self._shown = time.monotonic()
        self._first = 0
        self._live: Any = None
        if console.rich.is_terminal and not console.rich.quiet:
            progress = require("rich.progress", "showing progress")
            self._live = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=20),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[note]}", markup=False),
                console=console.rich,
            )
            self._task = self._live.add_task(what, total=total, note="")
            self._live.start()

    def start_at(self, done: int) -> None:
        """Where a resumed run begins: those steps do not count into the time left."""
        self.done = self._first = done

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.note = note or self.note
        text = "  ".join(part for part in (self.note, f"{clock(self.left())} left") if part)
        if self._live is not None:
            self._live.update(self._task, completed=self.done, note=text)
        elif time.monotonic() - self._shown >= _LINE_EVERY:
            self._shown = time.monotonic()
            self.console.say(f"{self.what} {self.done}/{self.total}  {text}")

    def left(self) -> float:
        """Estimated seconds to the end."""
        passed = time.monotonic() - self._start
        return passed / max(self.done - self._first, 1) * (self.total - self.done)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def clock(seconds: float) -> str:
    """`83` → `1:23`."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def size(count: int) -> str:
    """`1536000` → `1.5 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
