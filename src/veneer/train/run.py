"""The flow of `veneer train`, from settings to a saved, checked and reported adapter."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

import veneer
from veneer.inspect.summary import update_norms
from veneer.train import checks
from veneer.train.batches import Collator
from veneer.train.console import Console, clock, is_first_process
from veneer.train.evaluate import Evaluation, evaluate
from veneer.train.extras import require
from veneer.train.forms import Example
from veneer.train.job import Job, make_plan, prepare, show_dry_run, show_plan
from veneer.train.model import pick_device
from veneer.train.quantised import dense_kept
from veneer.train.report import Results, comparison, samples, samples_note, write_report, write_results
from veneer.train.schema import ConfigError
from veneer.train.settings import Settings
from veneer.train.start import begin

ADAPTER, METRICS, REPORT, CONFIG = "adapter", "metrics.jsonl", "report.html", "config.json"


def train(settings: Settings, dry_run: bool = False, resume: str | None = None) -> Results | None:
    """The whole run; None after a dry run. `resume` is a checkpoint folder, or "last".

    Raises `VeneerError` (in one of its kinds) for everything that the user can mend.
    """
    for library in ("transformers", "accelerate", "jinja2", "rich"):
        require(library, "veneer train")
    started = time.monotonic()
    console = Console()
    if settings.training.threads:
        torch.set_num_threads(settings.training.threads)
    _check_directory(settings)
    checkpoint = None if dry_run else _prepare_directory(settings, resume)
    job = prepare(settings, console)
    show_plan(job)
    if dry_run:
        show_dry_run(job)
        return None
    results = _run(job, checkpoint)
    results.facts.append(("Whole run", clock(time.monotonic() - started)))
    _write(job, results)
    return results


# -- the run ----------------------------------------------------------------------------------------------------


def _check_directory(settings: Settings) -> None:
    """A file where the output directory, or one above it, should be."""
    directory = Path(settings.output.directory)
    there = next((path for path in (directory, *directory.parents) if path.exists()), None)
    if there is not None and not there.is_dir():
        raise ConfigError(f"output.directory {str(directory)!r}: {str(there)!r} is a file, not a directory")


def _prepare_directory(settings: Settings, resume: str | None) -> str | None:
    """Check the output directory before minutes are spent; the checkpoint to resume from, if any."""
    directory = Path(settings.output.directory)
    utils = require("transformers.trainer_utils", "veneer train")
    if resume is not None:
        found = utils.get_last_checkpoint(str(directory)) if resume == "last" and directory.is_dir() else resume
        if found is None or not Path(found).is_dir():
            raise ConfigError(f"--resume: there is no checkpoint {resume!r} in {str(directory)!r}")
        return found
    earlier = [name for name in (ADAPTER, METRICS) if (directory / name).exists()]
    stale = sorted(directory.glob("checkpoint-*")) if directory.is_dir() else []
    if (earlier or stale) and not settings.output.overwrite:
        found = ", ".join([*earlier, *(path.name for path in stale[:1])])
        raise ConfigError(
            f"output.directory {str(directory)!r} holds an earlier run ({found}); "
            "choose another, pass --resume, or set output.overwrite: true"
        )
    if stale:
        raise ConfigError(
            f"{str(directory)!r} holds checkpoints of an earlier run ({stale[0].name}, ...), which would mix with the "
            "new ones: resume with --resume, or remove them"
        )
    directory.mkdir(parents=True, exist_ok=True)
    return None


def _evaluate(job: Job, when: str) -> Evaluation | None:
    if not job.heldout:
        return None
    settings = job.settings.evaluation
    total = len(job.heldout) * (2 if settings.generate else 1)
    began = time.monotonic()
    with job.console.progress(f"evaluating {when}", total) as bar:
        found = evaluate(job.model, job.data.heldout, job.heldout, job.encoder, settings, bar.advance)
    accuracy = f", exact match {found.correct}/{len(found.answers)}" if found.answers else ""
    seconds = time.monotonic() - began
    job.console.say(f"Held out {when}: loss {found.loss:.4f}{accuracy}  ({seconds:.0f} s)")
    return found


def _run(job: Job, checkpoint: str | None) -> Results:
    settings = job.settings
    results = Results(
        title=f"{job.settings.model.name}: {len(job.train)} examples",
        settings=settings.source, plan=str(job.plan), samples=settings.evaluation.samples,
    )  # fmt: skip
    _place(job)
    arguments = _arguments(job)
    job.console.heading("Before training")
    results.before = _evaluate(job, "before training")
    results.facts += begin(job, _probe(job), resumed=checkpoint is not None)
    job.console.heading("Training")
    with dense_kept(settings.model.keep_dense_mb):
        _fit(job, arguments, results, checkpoint)
    job.console.heading("After training")
    results.after = _evaluate(job, "after training")
    results.norms = update_norms(job.model, settings.adapter.name)
    _save(job)
    if is_first_process():
        probe = _probe(job)
        results.checks = checks.check_adapter(job.model, job.loaded, settings, job.directory / ADAPTER, probe)
    return results


def _place(job: Job) -> None:
    """The model on its device. Packed weights may be other tensors there, for which the plan has to be made again."""
    device = pick_device()
    if device.type != "cpu":
        job.model.to(device)
        job.plan = make_plan(job.settings, job.model, job.steps)


def _arguments(job: Job) -> Any:
    """transformers' arguments; making them joins the processes of a torchrun."""
    from veneer.train.trainer import training_arguments

    settings = job.settings
    return training_arguments(settings.training, settings.evaluation, job.directory, job.steps)


def _fit(job: Job, arguments: Any, results: Results, checkpoint: str | None) -> None:
    # these modules subclass classes of transformers, which must not be imported before a command needs it
    from veneer.train.progress import MetricsLog, ProgressCallback
    from veneer.train.trainer import AdapterTrainer, TimeLimit

    settings = job.settings
    log = MetricsLog(job.directory / METRICS)
    progress = ProgressCallback(job.console, log)
    callbacks: list[Any] = [progress]
    limit = TimeLimit(settings.training.max_minutes) if settings.training.max_minutes else None
    if limit is not None:
        callbacks.append(limit)
    trainer = AdapterTrainer(
        job.model, arguments, job.train, job.heldout, job.encoder.tokenizer.pad_token_id,
        adapter_name=settings.adapter.name, callbacks=callbacks,
    )  # fmt: skip
    progress.trainer = trainer
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        progress.stop()
        results.metrics = log.rows
    done = trainer.state.global_step
    job.console.say(f"{done} steps in {clock(progress.seconds)}, {progress.rate():.0f} tokens/s")
    results.facts += [
        ("Model", job.loaded.source),
        ("Trainable parameters", f"{job.plan.trainable_parameters:,} of {job.plan.base_parameters:,}"),
        ("Steps", f"{done} of {job.steps}"),
        ("Training time", f"{progress.seconds:.1f} s"),
        ("Speed", f"{progress.rate():.0f} tokens/s (padding not counted)"),
    ]
    if limit is not None and limit.reached:
        note = f"stopped by training.max_minutes {settings.training.max_minutes:g} before the schedule's end"
        job.console.say(note, style="yellow")
        results.facts.append(("Note", note))
    if settings.evaluation.keep_best and trainer.state.best_model_checkpoint:
        best = Path(trainer.state.best_model_checkpoint).name
        results.facts.append(("Best checkpoint", f"{best}, held-out loss {trainer.state.best_metric:.4f}"))


def _save(job: Job) -> None:
    if not is_first_process():
        return
    report = veneer.save(job.model, job.directory / ADAPTER, name=job.settings.adapter.name)
    job.console.say(f"Adapter: {job.directory / ADAPTER}")
    for line in str(report).splitlines()[1:]:
        job.console.say("  " + line)
    config = {
        "model": vars(job.settings.model),
        "adapter": job.settings.adapter.name,
        "system": _common_system(job.data.train),
        "settings": job.settings.source,
    }
    text = json.dumps(config, indent=2, default=str, ensure_ascii=False)
    (job.directory / CONFIG).write_text(text + "\n", encoding="utf-8")


def _common_system(examples: list[Example]) -> str | None:
    """The system message that all training chats share, for `veneer chat` to use the same."""
    found = {e.messages[0]["content"] if e.messages[0]["role"] == "system" else None for e in examples if e.is_chat}
    return found.pop() if len(found) == 1 else None


def _probe(job: Job) -> dict[str, torch.Tensor]:
    """A batch on which logits are compared: a few held-out examples, or training ones where none are held out."""
    batch = Collator(job.encoder.tokenizer.pad_token_id)((job.heldout or job.train)[:4])
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def _write(job: Job, results: Results) -> None:
    """Tables and checks on the console, and the report's files."""
    if not is_first_process():
        return
    console = job.console
    rows = comparison(results)
    if rows:
        console.heading("Result")
        console.table(["", "before", "after"], [list(row) for row in rows])
    shown = samples(results)
    if shown:
        console.heading("Sample answers")
        console.say(samples_note(shown))
    for sample in shown:
        console.say()
        console.say(f"request   {sample['prompt']}", style="bold")
        for when in ("before", "after"):
            right = sample[f"{when}_right"]
            mark = "right" if right else "wrong"
            console.say(f"{when:<8}  {mark}  {_clip(sample[when])}", style="green" if right else "red")
        if not sample["after_right"]:
            console.say(f"expected         {_clip(sample['reference'])}")
    console.heading("Checks")
    for check in results.checks:
        mark, style = ("passed", "green") if check.passed else ("FAILED", "bold red")
        console.say(f"{mark}  {check.name}: {check.detail}", style=style)
    write_results(results, job.directory)
    if job.settings.output.report:
        remark = write_report(results, job.directory / REPORT)
        console.say(f"Report: {job.directory / REPORT}, figures: {METRICS}, results.json, answers.jsonl")
        if remark:
            console.say(f"No plots in the report: {remark}", style="yellow")


def _clip(text: str, length: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
