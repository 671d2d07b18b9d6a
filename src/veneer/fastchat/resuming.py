"""Going on from a checkpoint: which one, what is said of it, and what a run notes of itself for later."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from veneer.method import VeneerError
from veneer.train import quantised
from veneer.train.adapter_files import holds_adapter, read_record
from veneer.train.settings import ModelSettings


def record(settings: ModelSettings, template: str) -> dict[str, Any]:
    """What stands beside the adapter: how the base was held, and how conversations were written out.

    Whether code that comes with a model may run is not in it: the folder may go to somebody else, who decides that.
    """
    model = {key: getattr(settings, key) for key in ("name", "dtype", "quantize", "cache_dir")}
    return {"model": model, "conversation_template": template}


def checkpoint(training: Any) -> str | None:
    """The checkpoint to go on from: the one named, or the last in the output directory. Raises `VeneerError`."""
    named = training.resume_from_checkpoint
    if named is not None and str(named).lower() not in ("true", "false"):
        if not Path(named).is_dir():
            raise VeneerError(f"--resume_from_checkpoint: there is no checkpoint at {named!r}")
        if not holds_adapter(Path(named)) or steps_of(str(named)) is None:
            raise VeneerError(f"--resume_from_checkpoint: {named!r} is no checkpoint: it needs an adapter and "
                              "trainer_state.json, as a checkpoint-N has them")
        return str(named)
    if str(named).lower() == "false":
        return None
    there = Path(training.output_dir).is_dir()
    last = transformers.trainer_utils.get_last_checkpoint(training.output_dir) if there else None
    if last is None and named is not None:
        raise VeneerError(f"--resume_from_checkpoint: {training.output_dir!r} has no checkpoint")
    return last


def steps_of(path: str) -> int | None:
    """How many steps a checkpoint has behind it; None where it does not say."""
    try:
        found = json.loads((Path(path) / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    steps = found.get("global_step") if isinstance(found, dict) else None
    return steps if isinstance(steps, int) else None


def warnings_of(now: Mapping[str, Any], output_dir: str, resumed: str | None) -> list[str]:
    """What to warn of: a checkpoint of a run that was another in what no error can tell, and, where training starts
    anew, checkpoints that stay. now: the `record` of this run."""
    if resumed is None:
        return _stay(Path(output_dir))
    then = read_record(Path(resumed))
    if then is None:
        return []
    lines = []
    before, here = _held(then["model"]), _held(now["model"])
    if before != here:
        lines.append(f"{resumed} was trained over a base held as {before}, and this run holds it as {here}, so "
                     "that the adapter meets other rounding than it has made up for; give --q_lora, --bf16 and --fp16 "
                     "as they were to go on as before")
    template = then.get("conversation_template")
    if template not in (None, now["conversation_template"]):
        lines.append(f"{resumed} was trained on conversations in the template {template!r}, and this run writes them "
                     f"in {now['conversation_template']!r}")
    return lines


def _held(model: Mapping[str, Any]) -> str:
    scheme = model.get("quantize")
    dtype = str(model.get("dtype"))
    return dtype if scheme is None else f"{quantised.parse(scheme)[0]}, the rest in {dtype}"


def _stay(folder: Path) -> list[str]:
    """Checkpoints of an earlier run, which count as the last ones until this run comes to higher numbers."""
    found = sorted(int(match[1]) for path in folder.glob("checkpoint-*") if path.is_dir()
                   and (match := re.fullmatch(r"checkpoint-(\d+)", path.name)))
    if not found:
        return []
    names = f"checkpoint-{found[-1]}" if len(found) == 1 else f"checkpoints up to checkpoint-{found[-1]}"
    return [f"{str(folder)!r} keeps {names} of an earlier run. Until this run has saved a higher number, the next one "
            "would go on from there, and not from this run: remove them, or give another --output_dir"]
