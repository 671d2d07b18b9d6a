"""Loss curves of the demo from every start of LoRA: same data, order, rate and number of steps; a table and a plot.

    python benchmarks/inits.py [--only pissa eva ...] [--residual] [--steps 30] [--rate 2e-3]

Each is a run of the training command with one other line of YAML (`adapter: {..., init: ...}`), a start from data with
its pass over the training data. One rate for all, the demo's, which was found for "kaiming": a start with another best
rate is not shown at its best, which --rate can look into.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the demo's model is embedded; nothing is to be looked up

import matplotlib.figure
import torch

import common
from methods import DEMO, Trial, run, settings_of
from veneer.train.report import Results

PLOT = pathlib.Path(__file__).with_name("inits.png")
STARTS: dict[str, Any] = {
    "kaiming": "kaiming", "pissa": "pissa", "olora": "olora", "orthogonal": "orthogonal", "eva": "eva",
    "corda": "corda", "lora_ga": "lora_ga", "loftq": {"init": "loftq", "bits": 4, "iterations": 5},
}
ON_NF4 = "kaiming on nf4"
#: starts of which the base can hold the rest itself
MOVING = ("pissa", "olora", "corda", "lora_ga")


@dataclass
class Curve:
    """What a run says of its start: (step, loss) of training and held out, and its report's words."""

    label: str
    training: list[tuple[int, float]]
    heldout: list[tuple[int, float]]
    start: str
    seconds: float

    @classmethod
    def of(cls, label: str, results: Results) -> Curve:
        def points(key: str) -> list[tuple[int, float]]:
            return [(row["step"], row[key]) for row in results.metrics if key in row]

        facts = dict(results.facts)
        seconds = [re.search(r"([\d.]+) s", facts.get(name, "0 s")) for name in ("Calibration", "Start")]
        spent = sum(float(found[1]) for found in seconds if found is not None)
        heldout = [(0, results.before.loss), *points("heldout_loss")]
        return cls(label, points("loss"), heldout, facts["Start"].partition("; ")[2], spent)


# -- runs -------------------------------------------------------------------------------------------------
def variants(args: argparse.Namespace) -> dict[str, Mapping[str, Any]]:
    """Label → the options of LoRA. LoftQ ends on a base in 4 bits, so the plain start on such a base is beside it."""
    found: dict[str, Mapping[str, Any]] = {key: {"init": STARTS[key]} for key in args.only}
    if args.residual:
        found |= {f"{key}, residual base": {"init": STARTS[key], "residual": "base"} for key in args.only
                  if key in MOVING}
    return found | ({ON_NF4: {"init": "kaiming"}} if "loftq" in args.only else {})


def curve(args: argparse.Namespace, label: str, options: Mapping[str, Any]) -> Curve:
    base = {"model": {"quantize": "nf4"}} if label == ON_NF4 else {}
    trial = Trial(label, {"method": "lora", "rank": args.rank, **options}, args.rate)
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(args, trial, args.rate, pathlib.Path(folder) / "run",
                               evaluation={"generate": False, "every": args.every},
                               output={"check_reload": False, "check_merge": False}, **base)
        return Curve.of(label, run(settings))


# -- table and plot ---------------------------------------------------------------------------------------
def table(curves: Sequence[Curve]) -> str:
    steps = [step for step, _ in curves[0].heldout]
    marks = sorted({steps[len(steps) // 3], steps[2 * len(steps) // 3], steps[-1]})
    head = ["start", *(f"held out, step {step}" for step in marks), "training loss, mean", "start s", "at the start"]
    plain = next((c for c in curves if c.label == "kaiming"), curves[0])
    lines = []
    for each in sorted(curves, key=lambda c: c.heldout[-1][1]):
        losses = dict(each.heldout)
        mean = sum(loss for _, loss in each.training) / len(each.training)
        at = [f"{losses[step]:.4f}" + (f" ({losses[step] / dict(plain.heldout)[step] - 1:+.0%})"
                                       if each is not plain else "") for step in marks]
        lines.append([each.label, *at, f"{mean:.4f}", f"{each.seconds:.1f}", each.start])
    return common.table(head, lines)


def plot(curves: Sequence[Curve], path: pathlib.Path) -> None:
    """Held-out loss over steps; the plain start in black."""
    figure = matplotlib.figure.Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for each in curves:
        style: dict[str, Any] = {"linewidth": 1.2, "linestyle": "--" if "residual" in each.label else "-"}
        if each.label == "kaiming":
            style |= {"color": "black", "linewidth": 2.2}
        axes.plot(*zip(*each.heldout, strict=True), label=each.label, **style)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})


# -- command line -----------------------------------------------------------------------------------------
def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--residual", action="store_true", help="those that move the base also with residual: base")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=5, help="steps between two held-out losses")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--config", type=pathlib.Path, default=DEMO, help="another demo than examples/demo.yaml")
    parser.add_argument("--plot", type=pathlib.Path, default=PLOT)
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    if args.steps % args.every:
        parser.error(f"--steps {args.steps} must be a multiple of --every {args.every}, so that the last step is seen")
    args.minutes = None
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    described = common.machine(torch.device("cpu"))
    curves: list[Curve] = []
    for label, options in variants(args).items():
        curves.append(curve(args, label, options))
        print(table(curves), file=sys.stderr, flush=True)
    shown = table(curves)
    print(shown)
    plot(curves, args.plot)
    best = min(curves, key=lambda c: c.heldout[-1][1]).label
    conditions = (
        f"{args.config.name}, LoRA r={args.rank} from every start, {args.steps} steps at one peak rate of "
        f"{args.rate:g}, the same examples in the same order; held-out loss in nats per token, and in brackets how far "
        f"from the plain start's. Lowest at the end: {best}. `start s`: calibration and attach. One run each.\n\n"
        f"![Held-out loss over steps]({args.plot.name})\n")
    common.write_section(args.results, "inits", common.header(
        "Loss curves from every start", argv, "inits.py", conditions, described) + "\n" + shown)


if __name__ == "__main__":
    main(sys.argv[1:])
