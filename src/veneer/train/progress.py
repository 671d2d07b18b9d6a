"""Trainer callback: the progress bar and metrics.jsonl."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import transformers

from veneer.train.console import Console, is_first_process

# the Trainer's names → ours
_NAMES = {"loss": "loss", "eval_loss": "heldout_loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate"}


class MetricsLog:
    """One JSON object a line; written by the first process only, and flushed at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def begin(self, first_step: int) -> None:
        """Start the file, or keep what an interrupted run wrote up to the step it is resumed from."""
        if first_step and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.rows = [row for row in map(json.loads, lines) if row["step"] <= first_step]
        if is_first_process():
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if is_first_process():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


class ProgressCallback(transformers.TrainerCallback):
    """Loss, tokens per second and time left, while training."""

    def __init__(self, console: Console, log: MetricsLog) -> None:
        self.console, self.log = console, log
        self.trainer: Any = None  # set once the trainer exists
        self.seconds = 0.0
        self._bar: Any = None
        self._context: Any = None
        self._start = 0.0
        self._paused = 0.0
        self._note = ""

    def rate(self) -> float:
        """Tokens per second over all processes since the start, evaluations left out."""
        passed = time.monotonic() - self._start - self._paused
        return self.trainer.tokens_seen * self.trainer.accelerator.num_processes / max(passed, 1e-9)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.monotonic()
        self.log.begin(state.global_step)
        self._context = self.console.progress("step", state.max_steps)
        self._bar = self._context.__enter__()
        self._bar.start_at(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.advance(1, f"{self._note}{self.rate():.0f} tokens/s")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "train_runtime" in logs:
            return
        row = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        row |= {_NAMES[key]: float(value) for key, value in logs.items() if key in _NAMES}
        if "loss" in logs:
            self._note = f"loss {float(logs['loss']):.4f}  "
            row["tokens_per_second"] = round(self.rate(), 1)
        row["seconds"] = round(time.monotonic() - self._start, 2)
        self.log.add(row)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """End the live bar; also called when training ends by an error."""
        if self._context is not None:
            self.seconds = time.monotonic() - self._start
            self._context.__exit__(None, None, None)
            self._context = None
