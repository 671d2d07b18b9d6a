"""Loading and checking everything that a run needs, and showing it before anything happens."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import veneer
from veneer.method import Method
from veneer.plan import Plan
from veneer.train.console import Console, size
from veneer.train.data import Dataset, load_data
from veneer.train.encode import Encoded, Encoder, show_mask
from veneer.train.memory import estimate
from veneer.train.model import Loaded, load_model
from veneer.train.schema import ConfigError
from veneer.train.settings import Settings


@dataclass(kw_only=True)
class Job:
    """What a run works with once everything is loaded and checked."""

    settings: Settings
    console: Console
    loaded: Loaded
    encoder: Encoder
    data: Dataset
    train: list[Encoded]
    heldout: list[Encoded]
    plan: Plan
    steps: int  # optimizer steps of the whole run

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def directory(self) -> Path:
        return Path(self.settings.output.directory)


def prepare(settings: Settings, console: Console) -> Job:
    """Load and check everything, and touch nothing: data first, for its mistakes show soonest."""
    data = load_data(settings.data, settings.base)
    console.say(f"Data: {len(data.train)} training examples, {len(data.heldout)} held out")
    began = time.monotonic()
    loaded = load_model(settings.model)
    console.say(f"Model: {loaded.source}, loaded in {time.monotonic() - began:.0f} s")
    for note in loaded.notes:
        console.say(note, style="yellow" if note.startswith("left") else "")
    encoder = make_encoder(settings, loaded.tokenizer)
    train, cut, skipped = encoder.encode_all(data.train)
    heldout_examples = data.heldout[: settings.evaluation.limit]
    heldout, cut_too, skipped_too = encoder.encode_all(heldout_examples)
    if not train:
        raise ConfigError("there are no training examples")
    if cut + cut_too + skipped + skipped_too:
        console.say(
            f"Longer than data.max_length {settings.data.max_length}: {cut + cut_too} examples cut, "
            f"{skipped + skipped_too} left out",
            style="yellow",
        )
    if settings.data.train_on == "answers" and not _teaches_to_stop(train[0], loaded.model):
        console.say(
            "The answers end with no token at which generation stops, so the model will not learn to stop; "
            "a chat template with an end token after each answer (data.chat_template) mends that",
            style="yellow",
        )
    steps = _steps(settings, len(train))
    return Job(
        settings=settings, console=console, loaded=loaded, encoder=encoder, train=train, heldout=heldout,
        data=Dataset(train=data.train, heldout=heldout_examples),
        plan=make_plan(settings, loaded.model, steps), steps=steps,
    )  # fmt: skip


def make_plan(settings: Settings, model: Any, steps: int) -> Plan:
    """What the settings' rules come to on this model."""
    return veneer.plan(model, scheduled(settings.adapter.rules, steps))


def _steps(settings: Settings, examples: int) -> int:
    from veneer.train.trainer import total_steps  # transformers, which must not be imported before it is needed

    return total_steps(settings.training, examples, int(os.environ.get("WORLD_SIZE", "1")))


def scheduled(rules: Mapping[str, Method | None] | Method, steps: int) -> Mapping[str, Method | None] | Method:
    """The rules for a run of so many steps, which a method that follows a schedule has to know."""
    if isinstance(rules, Method):
        return rules.scheduled(steps)
    return {pattern: None if method is None else method.scheduled(steps) for pattern, method in rules.items()}


def _teaches_to_stop(one: Encoded, model: Any) -> bool:
    """Whether an end token is among the last trained tokens (a template may put a line break after it)."""
    ends = model.generation_config.eos_token_id
    known = set(ends) if isinstance(ends, list) else {ends}
    return any(label in known for label in one.labels[-3:])


def make_encoder(settings: Settings, tokenizer: Any) -> Encoder:
    data = settings.data
    if data.chat_template is not None:
        path = settings.base / data.chat_template
        if not path.is_file():
            raise ConfigError(f"data.chat_template: there is no file {str(path)!r}")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return Encoder(tokenizer=tokenizer, train_on=data.train_on, max_length=data.max_length, too_long=data.too_long)


# -- what the user sees before anything happens -----------------------------------------------------------------


def show_plan(job: Job) -> None:
    job.console.heading("Plan")
    job.console.say(str(job.plan))


def show_dry_run(job: Job) -> None:
    """Data statistics, one example with its mask, and an estimate of the memory."""
    console, settings = job.console, job.settings
    lengths = sorted(len(e) for e in job.train)
    trained = sum(e.trained_tokens for e in job.train)
    forms: dict[str, int] = {}
    for example in job.data.train:
        forms[example.form] = forms.get(example.form, 0) + 1
    console.heading("Data")
    console.say("forms: " + ", ".join(f"{form} {count}" for form, count in forms.items()))
    console.say(
        f"tokens: {sum(lengths)} in all, {trained} with loss; an example has {lengths[0]} to {lengths[-1]}, "
        f"median {lengths[len(lengths) // 2]}"
    )
    console.say(f"steps: {job.steps}, each of {settings.training.batch_size * settings.training.gradient_accumulation}")
    console.heading(f"An example ({job.train[0].place}); loss on the tokens between ⟦ and ⟧")
    console.pieces(show_mask(job.train[0], job.encoder.tokenizer))
    console.heading("Memory (estimate)")
    rows = estimate(job.model, job.plan, job.train, settings)
    console.table(["what", "bytes"], [[what, size(count)] for what, count in rows])
    console.say("Dry run: nothing was trained or written.")
