"""One linear layer in every storage: its bytes, its error, what reading it costs, and a training step over it.

    python benchmarks/storages.py [--out 1536] [--in 576] [--rows 512] [--rank 16] [--dtype bf16] [--threads 1]
                                  [--schemes nf4 bnb-nf4 …] [--cpu-time]

Step: forward and backward of the layer with LoRA, input gradient included, beside the same over the dense weight.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import common
import veneer
from veneer.storage import packed_storage

SCHEMES = ("nf4", "nf8", "bnb-nf4", "bnb-fp4", "bnb-int8", "torchao-int8", "torchao-fp8", "hqq-4", "hqq-8", "gguf-q4_0",
           "gguf-q4_1", "gguf-q5_0", "gguf-q8_0")
DENSE = "dense"


class Layer(common.Contender):
    """A layer in one storage, with LoRA on it. spans: "read" and "step"."""

    def __init__(self, scheme: str, base: nn.Linear, rows: int, rank: int) -> None:
        super().__init__("lora", scheme, torch.device("cpu"))
        self.model = nn.Sequential(copy.deepcopy(base))
        if scheme != DENSE:
            veneer.quantize(self.model, scheme)
        layer = self.model[0]
        self.storage = packed_storage(layer)
        self.error, self.bytes = 0.0, base.weight.element_size()
        if self.storage is not None:
            weight = base.weight.detach().float()
            self.error = float((self.storage.read(layer, torch.float32) - weight).norm() / weight.norm())
            self.bytes = self.storage.nbytes(layer) / weight.numel()
        veneer.attach(self.model, veneer.LoRA(rank=rank))
        self.x = torch.randn(rows, base.in_features, dtype=base.weight.dtype, requires_grad=True)
        self.dy = torch.randn(rows, base.out_features, dtype=base.weight.dtype)

    def run(self) -> dict[str, float]:
        began, layer = self.start(), self.model[0]
        if self.storage is not None:
            self.storage.read(layer, self.x.dtype)
        read = self.moment()
        self.model(self.x).backward(self.dy)
        end = self.moment()
        return {"read": self.seconds(began, read), "step": self.seconds(read, end)}

    def between(self) -> None:
        self.x.grad = None
        self.model.zero_grad()


HEAD = ["scheme", "bytes per number", "‖Q − W‖ ÷ ‖W‖", "read, ms", "step, ms", "step ÷ dense"]


def rows(args: argparse.Namespace) -> list[list[object]]:
    torch.manual_seed(0)
    base = nn.Linear(args.in_, args.out, bias=False, dtype=common.DTYPES[args.dtype])
    nn.init.normal_(base.weight, std=0.02)
    layers = [Layer(scheme, base, args.rows, args.rank) for scheme in (DENSE, *args.schemes)]
    times = common.interleave(layers, args.repetitions, args.warmup, args.cpu_time)
    return [_row(layer, layers[0], times) for layer in layers]


def _row(layer: Layer, dense: Layer, times: common.Times) -> list[object]:
    def milliseconds(span: str) -> str:
        return f"{1e3 * common.Spread.of(times.of(layer, span)).median:.2f}"

    read = "" if layer is dense else milliseconds("read")
    return [layer.name, f"{layer.bytes:.3f}", f"{layer.error:.4f}", read, milliseconds("step"),
            times.ratio(layer, dense, "step")]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, help="as veneer.quantize takes them")
    parser.add_argument("--dtype", default="bf16", choices=common.DTYPES)
    for name, value in (("out", 1536), ("in", 576), ("rows", 512), ("rank", 16), ("threads", 1), ("repetitions", 60),
                        ("warmup", 5)):
        parser.add_argument(f"--{name}", type=int, default=value, dest="in_" if name == "in" else name)
    parser.add_argument("--cpu-time", action="store_true", help=common.CPU_TIME)
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args: Any = parse(argv)
    torch.set_num_threads(args.threads)
    described = common.machine(torch.device("cpu"))
    shown = common.table(HEAD, rows(args))
    print(shown)
    conditions = (f"A weight ({args.out}, {args.in_}) of normal numbers, {args.dtype}; LoRA r={args.rank}, {args.rows} "
                  "rows; bytes with all scales. `read`: the whole weight once; a step reads it twice. Median of "
                  f"{args.repetitions} repetitions; the ratio is paired, with quartiles."
                  f"{common.CPU_TIME_NOTE if args.cpu_time else ''}\n")
    common.write_section(args.results, "storages", common.header(
        "One layer in every storage", argv, "storages.py", conditions, described) + "\n" + shown)


if __name__ == "__main__":
    main(sys.argv[1:])
