"""The start of a run's adapter: statistics of the training data where it needs them, and what it did, measured."""

from __future__ import annotations

import random
import statistics as numbers
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import veneer
from veneer.attached import attached
from veneer.calibrate import calibrate
from veneer.method import Method, VeneerWarning, method_to_dict
from veneer.plan import PlanEntry
from veneer.statistics import Statistics
from veneer.train.batches import Collator
from veneer.train.console import is_first_process
from veneer.train.job import Job
from veneer.train.loss import keeps_logits, masked_loss
from veneer.train.measure import kl_divergence, logits
from veneer.train.settings_checks import needing_statistics
from veneer.weights import moved

STATISTICS = "statistics.safetensors"
_SAMPLED = 8  # weights whose numbers are kept for a moment, to say how far a start has moved them


def begin(job: Job, probe: Mapping[str, Tensor], resumed: bool = False) -> list[tuple[str, str]]:
    """Attach the run's adapter; returns what to report of its start. `resumed` takes the statistics of the run that is
    gone on with, where it kept them."""
    facts: list[tuple[str, str]] = []
    found = _statistics(job, resumed, facts)
    before, kept = logits(job.model, probe), _originals(job)
    began = time.monotonic()
    adapter = job.settings.adapter
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", VeneerWarning)
        veneer.attach(job.model, job.plan, name=adapter.name, seed=adapter.seed, statistics=found)
    seconds = time.monotonic() - began
    facts.append(("Start", "; ".join([f"{seconds:.1f} s", _change(job, before, probe), *_ranks(job, found),
                                      *_errors(job, kept)])))
    for what, text in facts:
        job.console.say(f"{what}: {text}")
    _say(job, caught)
    return facts


def _say(job: Job, caught: list[warnings.WarningMessage]) -> None:
    for text in dict.fromkeys(str(each.message) for each in caught):
        job.console.say(text, style="yellow")


# -- statistics -------------------------------------------------------------------------------------------
def _statistics(job: Job, resumed: bool, facts: list[tuple[str, str]]) -> Statistics | None:
    if not needing_statistics(job.settings.adapter.rules):
        return None
    given, own = job.settings.calibration.statistics, job.directory / STATISTICS
    file = own if given is None else job.settings.base / given
    if own.is_file() and resumed:
        file = own
    if file.is_file() and (resumed or given is not None):
        found = Statistics.load(file)
        found.check(job.model)
        facts.append(("Calibration", f"{found.tokens:,} tokens, from {file.name}"))
        return found
    began = time.monotonic()
    found = _calibrated(job)
    seconds = time.monotonic() - began
    # a run that may be resumed needs the same bits again
    if is_first_process() and (given is not None or job.settings.training.save_every):
        found.save(file)
    facts.append(("Calibration", f"{found.tokens:,} tokens of training data in {seconds:.1f} s; {found}"))
    return found


def _calibrated(job: Job) -> Statistics:
    """From a random part of the training data; each process sees its share of it."""
    settings = job.settings.calibration
    size = settings.batch_size or job.settings.training.batch_size
    order = random.Random(job.settings.adapter.seed).sample(range(len(job.train)), len(job.train))
    rank, world = _processes()
    mine = order[: settings.batches * size * world][rank::world]
    collate, keep = Collator(job.encoder.tokenizer.pad_token_id), keeps_logits(job.model)

    def loss(model: Any, batch: Any) -> Tensor:
        total, count, _ = masked_loss(model, batch, keep)
        return total / max(count, 1)

    batches = [collate([job.train[i] for i in mine[at : at + size]]) for at in range(0, len(mine), size)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", VeneerWarning)
        found = calibrate(job.model, batches, job.plan, forward=loss, progress=is_first_process())
    _say(job, caught)
    return found.gathered()


def _processes() -> tuple[int, int]:
    dist = torch.distributed
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


# -- what it did ------------------------------------------------------------------------------------------
def _change(job: Job, before: Tensor, probe: Mapping[str, Tensor]) -> str:
    after = logits(job.model, probe)
    if torch.equal(before, after):
        return "the output has the base's bits"
    mask = probe["attention_mask"].bool().to(after.device)
    return f"the output moves by KL {kl_divergence(before[mask], after[mask]):.2e} from the base's"


def _ranks(job: Job, found: Statistics | None) -> list[str]:
    """How ranks were dealt out, and what share of the inputs' variance they reach into."""
    planned = {entry.name: rank_of(entry.method) for entry in job.plan.entries}
    there = {item.weight.name: rank_of(item.adapter.method) for item in attached(job.model, job.settings.adapter.name)}
    ranks = {name: there.get(name, 0) for name in planned if planned[name] is not None}
    texts = []
    if ranks and ranks != {name: planned[name] for name in ranks}:
        values = sorted(rank or 0 for rank in ranks.values())
        left = f", {values.count(0)} weights left alone" if 0 in values else ""
        texts.append(f"ranks {values[0]} to {values[-1]} (median {numbers.median(values):g}){left}")
    shares = {name: (_explained(found[name], ranks[name]), _explained(found[name], planned[name]))
              for name in ranks if found is not None and "total" in found.get(name, {})}
    if shares:
        own, equal = (sum(each) / len(each) for each in zip(*shares.values(), strict=True))
        texts.append(f"A spans {own:.1%} of the inputs' variance, averaged over weights"
                     + (f" ({equal:.1%} with equal ranks)" if len(texts) else ""))
    return texts


def _explained(evidence: Mapping[str, Tensor], rank: int | None) -> float:
    return float(evidence["singular"][: rank or 0].double().square().sum() / evidence["total"].clamp_min(1e-30))


def rank_of(method: Method | None) -> int | None:
    """The rank among a method's options, or those of the method inside it."""
    options: Any = None if method is None else method_to_dict(method)
    while isinstance(options, Mapping):
        if isinstance(options.get("rank"), int):
            return options["rank"]
        options = next((value for value in options.values() if isinstance(value, Mapping) and "method" in value), None)
    return None


def _originals(job: Job) -> dict[str, Tensor]:
    """Copies of a few of the weights that the start may rewrite, spread over the model."""
    entries: list[PlanEntry] = [entry for entry in job.plan.entries if entry.method.moves_base]
    step = max(1, -(-len(entries) // _SAMPLED))
    return {entry.name: entry.weight.layout.matrix(entry.weight.read()).detach().float().clone()
            for entry in entries[::step]}


@torch.no_grad()
def _errors(job: Job, kept: Mapping[str, Tensor]) -> list[str]:
    """‖W − W'‖/‖W‖ of rewritten weights, without and with what the adapter adds; the median of those kept."""
    alone, helped = [], []
    for item in attached(job.model, job.settings.adapter.name):
        if item.weight.name in kept and moved(item.weight):
            W, now = kept[item.weight.name], item.weight.layout.matrix(item.weight.read()).float()
            alone.append(float((W - now).norm() / W.norm()))
            helped.append(float((W - item.adapter.new_weight(now)).norm() / W.norm()))
    if not alone:
        return []
    return [f"the base weights are rewritten: off by {numbers.median(alone):.2%}, by {numbers.median(helped):.2%} with "
            f"the pair (median of {len(alone)} weights)"]

