"""report.html: one file without outside assets, for a person; results.json: the same figures for a program."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import veneer
from veneer.train import plots
from veneer.train.evaluate import Evaluation
from veneer.train.extras import MissingExtraError, require

_LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "numpy")


@dataclass(kw_only=True)
class Check:
    """Something the run proved about its own result."""

    name: str
    passed: bool
    detail: str


@dataclass(kw_only=True)
class Results:
    """Everything a run found out."""

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    before: Evaluation | None = None
    after: Evaluation | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    norms: dict[str, float] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)
    plan: str = ""
    samples: int = 3


def versions() -> dict[str, str]:
    """Versions of what the run depended on."""
    found = {"veneer": veneer.__version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


def machine() -> str:
    """Kind of machine, without its name."""
    kind = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        kind += f", {torch.cuda.get_device_name()}"
    return kind


def comparison(results: Results) -> list[tuple[str, str, str]]:
    """Rows (what, before, after) of the table."""
    before, after = results.before, results.after
    if before is None or after is None:
        return []
    rows = [("held-out loss (nats per token)", f"{before.loss:.4f}", f"{after.loss:.4f}")]
    if before.answers:
        rows.append(("exact match", _share(before), _share(after)))
    return rows


def _share(evaluation: Evaluation) -> str:
    return f"{evaluation.correct}/{len(evaluation.answers)} ({evaluation.correct / len(evaluation.answers):.1%})"


def samples(results: Results) -> list[dict[str, Any]]:
    """The first held-out prompts with both answers. Where the adapter answers all of these right but not all others,
    the last one gives way to the first that it answers wrong: a reader should see what goes wrong as well."""
    if results.before is None or results.after is None:
        return []
    pairs = list(zip(results.before.answers, results.after.answers, strict=True))
    chosen = list(range(min(results.samples, len(pairs))))
    wrong = next((i for i, (_, after) in enumerate(pairs) if not after.correct), -1)
    if len(chosen) > 1 and wrong > chosen[-1]:
        chosen[-1] = wrong
    return [
        {
            "prompt": b.prompt, "reference": b.reference, "before": b.answer, "after": a.answer,
            "before_right": b.correct, "after_right": a.correct,
        }
        for b, a in (pairs[i] for i in chosen)
    ]  # fmt: skip


def samples_note(shown: list[dict[str, Any]]) -> str:
    """How the samples were chosen."""
    if len(shown) > 1 and not shown[-1]["after_right"] and all(s["after_right"] for s in shown[:-1]):
        note = f"The first {len(shown) - 1} held-out requests, and the first that is answered wrong after training"
    else:
        note = f"The first {len(shown)} held-out requests"
    return note + "; all are in answers.jsonl."


def write_report(results: Results, path: Path) -> str | None:
    """Write the HTML file; returns a remark when it has no plots."""
    jinja2 = require("jinja2", "writing the report")
    remark, drawn = None, {"loss_plot": "", "norm_plot": ""}
    try:
        drawn["loss_plot"] = plots.loss_plot(results.metrics)
        drawn["norm_plot"] = plots.norm_plot(results.norms) if results.norms else ""
    except MissingExtraError as error:
        remark = str(error)
    template = (Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    shown = samples(results)
    page = environment.from_string(template).render(
        title=results.title,
        subtitle=f"veneer {veneer.__version__}, {machine()}",
        comparison=comparison(results),
        samples=shown,
        samples_note=samples_note(shown),
        # matplotlib's own output; everything else on the page is escaped
        loss_plot=require("markupsafe", "writing the report").Markup(drawn["loss_plot"]),
        norm_plot=require("markupsafe", "writing the report").Markup(drawn["norm_plot"]),
        no_plots=f"Tables instead of plots: {remark}" if remark else "",
        losses=[(r["step"], _cell(r.get("loss")), _cell(r.get("heldout_loss"))) for r in results.metrics],
        norms=list(results.norms.items()),
        checks=[(c.name, c.passed, c.detail) for c in results.checks],
        facts=[*results.facts, ("Versions", ", ".join(f"{k} {v}" for k, v in versions().items()))],
        settings=json.dumps(results.settings, indent=2, default=str, ensure_ascii=False),
        plan=results.plan,
    )
    path.write_text(page, encoding="utf-8")
    return remark


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def write_results(results: Results, directory: Path) -> None:
    """results.json with all figures, and answers.jsonl with every held-out answer."""
    summary = {
        "title": results.title,
        "before": _figures(results.before),
        "after": _figures(results.after),
        "checks": [vars(check) for check in results.checks],
        "facts": dict(results.facts),
        "versions": versions(),
        "machine": machine(),
        "update_norms": results.norms,
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (directory / "results.json").write_text(text + "\n", encoding="utf-8")
    rows = samples(Results(title="", before=results.before, after=results.after, samples=10**9))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (directory / "answers.jsonl").write_text(lines, encoding="utf-8")


def _figures(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    return {
        "heldout_loss": evaluation.loss,
        "exact_match": evaluation.accuracy,
        "correct": evaluation.correct,
        "answers": len(evaluation.answers),
    }
