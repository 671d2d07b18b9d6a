"""The demo once with every method: the same model, data, order and number of steps, each method at its own rate.

    python benchmarks/methods.py [--methods lora loha ...] [--steps 100] [--minutes 5]
    python benchmarks/methods.py --search [--factors 0.3 1 3] [--steps 40]

A run is the library's own (`veneer train` with another `adapter` section), checks of the saved adapter included. LoRA
and DoRA have the demo's rate; the others come from short searches (15 to 25 steps), each near the best of three rates a
factor of three apart. `--search` sees the training data alone: it holds a share of it out as validation and never loads
the demo's held-out set into a run. It prints and writes no results.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the demo's model is embedded; nothing is to be looked up

import torch

import common
from veneer.train import config_file
from veneer.train.data import load_data
from veneer.train.forms import Example
from veneer.train.report import Results
from veneer.train.run import ADAPTER, train
from veneer.train.settings import Settings, parse_settings

DEMO = pathlib.Path(__file__).parent.parent / "examples" / "demo.yaml"


@dataclass(frozen=True)
class Trial:
    """A method as the demo's `adapter` section has it, and its peak learning rate."""

    label: str
    adapter: Mapping[str, Any]
    rate: float


TRIALS: dict[str, Trial] = {
    "lora": Trial("LoRA, r=16", {"method": "lora", "rank": 16}, 2e-3),
    "dropout": Trial("LoRA, r=16, dropout 0.05", {"method": "lora", "rank": 16, "dropout": 0.05}, 2e-3),
    "dora": Trial("DoRA, r=16", {"method": "dora", "rank": 16}, 2e-3),
    "adalora": Trial("AdaLoRA, r=24 to 16", {"method": "adalora", "init_r": 24, "target_r": 16}, 1.5e-2),
    "loha": Trial("LoHa, r=8", {"method": "loha", "rank": 8}, 1.5e-2),
    "lokr": Trial("LoKr, r=8", {"method": "lokr", "rank": 8}, 1.5e-2),
    "vblora": Trial("VB-LoRA, r=4, 256 vectors of 64", {"method": "vblora", "rank": 4, "vector_length": 64}, 3e-2),
    "vera": Trial("VeRA, r=256", {"method": "vera", "rank": 256}, 6e-2),
    "randlora": Trial("RandLoRA, r=32", {"method": "randlora", "rank": 32}, 1e-3),
}


# -- one run ----------------------------------------------------------------------------------------------
def settings_of(args: argparse.Namespace, trial: Trial, rate: float, directory: pathlib.Path,
                **sections: Mapping[str, Any]) -> Settings:
    """The config's settings with this method, rate and length; `sections` are laid over the rest."""
    config = config_file.read(args.config)
    if isinstance(config["model"], str):
        config["model"] = {"name": config["model"]}
    ours: dict[str, Mapping[str, Any]] = {
        "training": {"learning_rate": rate, "max_steps": args.steps, "max_minutes": args.minutes, "log_every": 1,
                     "threads": args.threads},
        "output": {"directory": str(directory), "overwrite": True, "report": False},
    }
    for layer in (ours, sections):
        for section, values in layer.items():
            config[section] = {**config.get(section, {}), **values}
    config["adapter"] = dict(trial.adapter)
    return parse_settings(config, args.config.parent)


def run(settings: Settings) -> Results:
    """Train; what the run prints goes to stderr, so that stdout has the table alone."""
    with contextlib.redirect_stdout(sys.stderr):
        results = train(settings)
    gc.collect()
    if results is None or results.before is None or results.after is None:
        raise RuntimeError(f"{settings.source} has no held-out examples to compare methods by")
    return results


# -- the table --------------------------------------------------------------------------------------------
HEAD = ["method", "learning rate", "held-out loss", "exact match", "steps", "training s", "s/step",
        "trainable parameters", "adapter bytes", "checks"]


def table(args: argparse.Namespace) -> list[list[object]]:
    lines: list[list[object]] = []
    for key in args.methods:
        trial = TRIALS[key]
        with tempfile.TemporaryDirectory() as folder:
            directory = pathlib.Path(folder) / key
            results = run(settings_of(args, trial, trial.rate, directory))
            size = sum(file.stat().st_size for file in (directory / ADAPTER).glob("*.safetensors"))
        if not lines:
            lines.append(["(none)", "", *_outcome(results.before), *[""] * 6])
        facts = dict(results.facts)
        first, last = results.metrics[0], results.metrics[-1]
        step = (last["seconds"] - first["seconds"]) / max(last["step"] - first["step"], 1)
        failed = [check.name for check in results.checks if not check.passed]
        lines.append([trial.label, f"{trial.rate:g}", *_outcome(results.after), last["step"], f"{last['seconds']:.0f}",
                      f"{step:.2f}", facts["Trainable parameters"].partition(" of ")[0], f"{size:,}",
                      f"FAILED: {', '.join(failed)}" if failed else "passed"])
        print(common.table(HEAD, lines), file=sys.stderr, flush=True)
    return lines


def _outcome(evaluation: Any) -> list[str]:
    answers = len(evaluation.answers)
    right = f"{evaluation.correct}/{answers} ({evaluation.accuracy:.0%})" if answers else ""
    return [f"{evaluation.loss:.4f}", right]


# -- the search for a rate --------------------------------------------------------------------------------
def search(args: argparse.Namespace) -> list[list[object]]:
    """Validation losses of each method at its rate times each factor; training data only."""
    lines: list[list[object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        data = folder / "train.jsonl"
        settings = settings_of(args, next(iter(TRIALS.values())), 1.0, folder)
        data.write_text("".join(json.dumps(_row(e)) + "\n" for e in load_data(settings.data, settings.base).train))
        config = config_file.read(args.config)
        said = {key: value for key, value in config["data"].items()
                if key not in ("train", "heldout", "heldout_share", "generator", "generator_options")}
        for key in args.methods:
            trial, losses = TRIALS[key], {}
            for factor in args.factors:
                rate = trial.rate * factor
                losses[rate] = run(_search_settings(args, trial, rate, folder / "run", said, data)).after.loss
            best = min(losses, key=lambda rate: losses[rate])
            lines += [[trial.label, f"{rate:.3g}", f"{loss:.4f}", "best" if rate == best else ""]
                      for rate, loss in losses.items()]
            print(common.table(SEARCH_HEAD, lines), file=sys.stderr, flush=True)
    return lines


SEARCH_HEAD = ["method", "learning rate", "validation loss", ""]


def _search_settings(args: argparse.Namespace, trial: Trial, rate: float, directory: pathlib.Path,
                     said: Mapping[str, Any], data: pathlib.Path) -> Settings:
    made = settings_of(args, trial, rate, directory, evaluation={"generate": False},
                       output={"check_reload": False, "check_merge": False})
    config = {**made.source, "data": {**said, "train": str(data), "heldout_share": args.validation}}
    return parse_settings(config, args.config.parent)


def _row(example: Example) -> dict[str, Any]:
    if example.is_chat:
        return {"messages": list(example.messages)}
    return {"prompt": example.prompt, "completion": example.text} if example.prompt else {"text": example.text}


# -- command line -----------------------------------------------------------------------------------------
def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(TRIALS), default=list(TRIALS))
    parser.add_argument("--steps", type=int, help="of each method; default 100, or 40 in a search")
    parser.add_argument("--minutes", type=float, help="end a method's training earlier, after so many minutes")
    parser.add_argument("--search", action="store_true", help="compare rates on a part of the training data instead")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.3, 1.0, 3.0], help="of each method's rate")
    parser.add_argument("--validation", type=float, default=0.1, help="share of the training data a search holds out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--config", type=pathlib.Path, default=DEMO, help="another demo than examples/demo.yaml")
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    if args.steps is None:
        args.steps = 40 if args.search else 100
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    described = common.machine(torch.device("cpu"))
    if args.search:
        print(common.table(SEARCH_HEAD, search(args)))
        return
    shown = common.table(HEAD, table(args))
    print(shown)
    limit = f" or {args.minutes:g} minutes" if args.minutes else ""
    conditions = (
        f"{args.config.name} with each `adapter` section of benchmarks/methods.py: {args.steps} steps{limit}, the same "
        "examples in the same order. `held-out loss` in nats per token; `exact match` of the greedy answers as JSON "
        "values; `training s` has no evaluation in it; `s/step` leaves out the first step; `adapter bytes` of the "
        "saved tensors; `checks`: the saved adapter reloads bit for bit and merges within the bar. One run each: with "
        "64 answers, a few more or less mean little.\n")
    common.write_section(args.results, "methods", common.header(
        "The demo with every method", argv, "methods.py", conditions, described) + "\n" + shown)


if __name__ == "__main__":
    main(sys.argv[1:])
