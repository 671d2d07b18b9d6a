"""One pass over some batches that collects what data-driven starts need: `veneer.calibrate`."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from veneer.calibration.collect import COLLECTORS, Collector
from veneer.calibration.progress import Progress
from veneer.calibration.rows import Masking, label_mask
from veneer.calibration.run import Forward, Pass, call, watched
from veneer.method import VeneerError, VeneerWarning, nearest
from veneer.plan import Plan, PlanEntry, Rules, plan_warning
from veneer.statistics import Statistics, base_of
from veneer.wrappers import unwrap


def calibrate(model: nn.Module, batches: Iterable[Any], rules: Rules | Plan, *, forward: Forward | None = None,
              mask: Masking = label_mask, max_batches: int | None = None, weights: Sequence[str] | None = None,
              compress: bool = True, hold: torch.device | str | None = None, progress: bool = True) -> Statistics:
    """Run the base model over `batches` and collect the statistics that the methods of `rules` start from.

    model: with or without adapters, which do not take part; in evaluation mode for the time of this pass. Its weights
    are not read and need no gradient, so that they may be packed. rules: what `attach` will be given, or its plan.
    forward: (model, batch) → output; by default model(**batch) for a mapping, else model(*batch) or model(batch). For
    gradients its output must be a scalar loss, or hold one as `.loss`.
    mask: batch → which positions count, bool; several masks for inputs of several shapes; None = all. By default those
    whose label is not -100, or, without labels, those that are no padding. A loss masks for itself.
    max_batches: no more than so many; components of inputs stop by themselves when they have settled (EVA's tau).
    weights: only these of the plan's weights, by name. compress: keep of a gradient only the triplets that its start
    takes. hold: where covariances and gradients are summed up, "cpu" say; None = beside the data. progress: a line on
    stderr, if that is a terminal.

    Returns `Statistics`, on the CPU. Takes the memory of one forward pass and, over all weights, of k·in numbers for k
    components of inputs, in² for a covariance, out·in for a gradient; weights with the same inputs share the first two.
    Raises `VeneerError` when no method of `rules` needs statistics, when the batches have no usable position, when a
    weight is never given an input or gets no gradient, and for NaN. Warns when components have not settled in the end,
    or when a mask fits no input of some weight.
    """
    entries = _entries(rules if isinstance(rules, Plan) else plan_warning(model, rules), weights)
    net, collectors = unwrap(model), _collectors(entries, hold)
    run = Pass(net, forward or call, mask, collectors)
    stopped = _run(run, batches, max_batches, progress)
    _check(run, collectors)
    _warn(collectors, run.batches, stopped)
    found: dict[str, dict[str, Tensor]] = {}
    for collector in collectors.values():
        found |= collector.evidence(compress)
    kinds = {name: kind for kind, collector in collectors.items() for name in collector.entries}
    _not_empty(found)
    ordered = {name: found[name] for name in entries}
    return Statistics(ordered, {name: kinds[name] for name in entries}, run.tokens,
                      base_of([entry.weight for entry in entries.values()]))


def _entries(made: Plan, names: Sequence[str] | None) -> dict[str, PlanEntry]:
    entries = {entry.name: entry for entry in made.entries if entry.method.need is not None}
    if not entries:
        methods = ", ".join(dict.fromkeys(str(entry.method) for entry in made.entries))
        raise VeneerError(f"calibrate: nothing in {methods} starts from data; a start that does is LoRA(init=\"eva\"), "
                          "\"corda\" or \"lora_ga\"")
    for name in names or ():
        if name not in entries:
            raise VeneerError(f"calibrate: no weight {name!r} with such a start{nearest(name, entries)}")
    chosen = {name: entry for name, entry in entries.items() if names is None or name in names}
    for name, entry in chosen.items():
        if not all(place.host.has_input for place in entry.weight.places):
            raise VeneerError(f"calibrate: {name!r} is read by its module as a parameter, so that its inputs are seen "
                              "nowhere; give it another start")
        if entry.weight.tensor.is_meta:
            raise VeneerError(f"calibrate: {name!r} is on the meta device; load the model first")
    return chosen


def _collectors(entries: Mapping[str, PlanEntry], hold: torch.device | str | None) -> dict[str, Collector]:
    by_kind: dict[str, dict[str, PlanEntry]] = {}
    for name, entry in entries.items():
        by_kind.setdefault(entry.method.need.kind, {})[name] = entry  # type: ignore[union-attr]
    unknown = [kind for kind in by_kind if kind not in COLLECTORS]
    if unknown:
        raise VeneerError(f"calibrate: there is no statistic {unknown[0]!r}{nearest(unknown[0], COLLECTORS)} Known: "
                          f"{', '.join(COLLECTORS)}")
    return {kind: COLLECTORS[kind](found, hold) for kind, found in by_kind.items()}


def _run(run: Pass, batches: Iterable[Any], max_batches: int | None, progress: bool) -> bool:
    """The whole pass; whether it ended before the batches did."""
    total = len(batches) if isinstance(batches, Sized) else None
    if max_batches is not None:
        total = max_batches if total is None else min(total, max_batches)
    bar = Progress(total, progress)
    try:
        with watched(run):
            for batch in itertools.islice(batches, max_batches):
                run.run(batch)
                bar.step(run.batches, run.note())
                if run.settled():
                    return True
    finally:
        bar.close()
    return max_batches is not None and run.batches == max_batches


def _check(run: Pass, collectors: Mapping[str, Collector]) -> None:
    if not run.batches:
        raise VeneerError("calibrate: there are no batches")
    if not run.tokens:
        raise VeneerError(f"calibrate: the {run.batches} batch{'es have' if run.batches > 1 else ' has'} no usable "
                          "position: every label is -100, or all is padding. Give data with labels, or another mask "
                          "(mask=lambda batch: batch[\"attention_mask\"])")
    for kind, collector in collectors.items():
        unseen = collector.unseen()
        if unseen:
            more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
            what = "got no gradient from the loss" if collector.wants_loss else "was given no input that counts"
            raise VeneerError(f"calibrate: {unseen[0]!r}{more} {what} in {run.batches} batch"
                              f"{'es' if run.batches > 1 else ''}, so there is no statistic {kind!r} of it; give other "
                              "data, or leave it out with a rule None")


def _not_empty(found: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, tensors in found.items():
        if "singular" in tensors and not len(tensors["singular"]):
            raise VeneerError(f"calibrate: the inputs of {name!r} do not vary: {int(tensors['count'])} of them, all "
                              "equal. Give more data")


def _warn(collectors: Mapping[str, Collector], batches: int, stopped: bool) -> None:
    texts = []
    for collector in collectors.values():
        left = collector.unsettled()
        if left and not stopped:
            texts.append(f"calibrate: the components of {len(left)} of {len(collector.entries)} weights ({left[0]!r}, "
                         f"…) had not settled after all {batches} batches; give more of them, or a smaller tau")
        if collector.unmasked:
            texts.append(f"calibrate: no mask has the shape of the input of {collector.unmasked[0]!r}"
                         f"{f' and {len(collector.unmasked) - 1} more' if len(collector.unmasked) > 1 else ''}, so all "
                         "of its positions counted, padding too; give mask=…")
    for text in texts:
        warnings.warn(text, VeneerWarning, stacklevel=3)
