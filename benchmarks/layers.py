"""Cost of one adapted linear layer: (forward + backward) ÷ (frozen forward + dX), Veneer beside peft.

    python benchmarks/layers.py [--methods lora dora loha ...] [--dtypes bf16 fp32] [--m 1024 --k 2048 --n 2048]
    python benchmarks/layers.py --sizes all [--seconds-per-cell 6]

Every contender stands over the same weight and gets the same input, which requires grad as inside a network,
and the same dY. Between repetitions each takes an optimizer step outside the timed span, so nothing kept from
one repetition (a norm, a cast) can serve the next. peft is timed at the layer itself, without its model wrapper.
Each method's contenders take turns with a frozen layer of their own, so only one method is in memory at a time.

One size gives a row for every contender; several give a row for every method at every size, and below the table
where Veneer was slower than peft or allocated more.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own messages would mix with the table

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import common
import veneer
from common import METHODS, Contender, Memory, Spread, Times
from veneer.attach import attached

# (dtype, method) → the bar for Veneer, and what its issue measured for peft, for the default sizes on 2 CPU threads.
BARS = {
    ("bf16", "lora"): (1.25, 1.50), ("bf16", "dropout"): (1.40, 2.84), ("bf16", "dora"): (1.40, 4.98),
    ("bf16", "adalora"): (1.30, 2.01), ("bf16", "loha"): (1.50, 4.29), ("bf16", "lokr"): (1.40, 4.49),
    ("bf16", "vblora"): (1.45, 1.66), ("bf16", "vera"): (1.70, 2.04), ("bf16", "randlora"): (4.00, 17.1),
    ("fp32", "lora"): (1.08, 1.12), ("fp32", "dropout"): (1.14, 1.39), ("fp32", "dora"): (1.14, 1.77),
    ("fp32", "adalora"): (1.10, 1.14), ("fp32", "loha"): (1.22, 2.89), ("fp32", "lokr"): (1.15, 2.76),
    ("fp32", "vblora"): (1.12, 1.14), ("fp32", "vera"): (1.35, 1.40), ("fp32", "randlora"): (3.40, 3.72),
}
BAR_SIZE = (1024, 2048, 2048)
BAR_OPTIONS = {"rank": 16, "threads": 2, "bias": False, "device": "cpu"}
ALL_SIZES = tuple((m, k, n) for (k, n), m in itertools.product([(576, 1536), (2048, 2048), (2048, 8192)],
                                                               [128, 1024, 4096]))
FROZEN, OURS, THEIRS, THEIRS_16 = "frozen", "Veneer", "peft", "peft, 16-bit adapter"


class Layer(Contender):
    """One linear layer, frozen or adapted, with its input and the gradient of its output."""

    def __init__(self, method: str, name: str, layer: nn.Module, x: Tensor, dy: Tensor) -> None:
        super().__init__(method, name, x.device)
        self.layer, self.dy = layer, dy
        self.x = x.detach().clone().requires_grad_()
        self.trained = [p for p in layer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4) if self.trained else None

    def run(self) -> dict[str, float]:
        start = self.start()
        y = self.layer(self.x)
        middle = self.moment()
        y.backward(self.dy)
        end = self.moment()
        return {"forward": self.seconds(start, middle), "backward": self.seconds(middle, end)}

    def between(self) -> None:
        self.x.grad = None
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def check(self, expected: Tensor) -> None:
        """Before the first step, while ΔW is known: the output it should have, and every gradient."""
        y = self.layer(self.x)
        error = (y - expected).abs().max() / expected.abs().max()
        y.backward(self.dy)
        missing = self.x.grad is None or any(p.grad is None for p in self.trained)
        if y.dtype != self.x.dtype or error > 0.02 or missing:
            raise RuntimeError(f"{self.name} {self.method} does not do the work: output {y.dtype}, off by "
                               f"{error:.2g}, gradients missing: {missing}")
        self.between()

    def memory(self) -> Memory:
        """Kept between forward and backward, the input included if the layer holds it; and the peak."""
        with common.measure_memory(self.device) as ledger:
            inner = self.x * 1  # an activation that dies here unless the layer keeps it
            y = self.layer(inner)
            del inner
            ledger.forward_done()
            output = y.untyped_storage().nbytes()
            y.backward(self.dy)
            del y
        self.between()
        return Memory(ledger.memory.kept - output, ledger.memory.peak)


class Cell(NamedTuple):
    """What is measured together: one method at one size, beside a frozen layer."""

    dtype: str
    size: tuple[int, int, int]
    method: str
    layers: dict[str, Layer]
    times: Times
    memory: dict[str, Memory]

    @property
    def repetitions(self) -> int:
        return len(self.times.of(self.layers[FROZEN], "forward"))

    def ratio(self, name: str, base: str, *spans: str) -> Spread:
        return self.times.ratio(self.layers[name], self.layers[base], *(spans or ("forward", "backward")))

    def milliseconds(self, name: str) -> float:
        return 1e3 * Spread.of(self.times.of(self.layers[name], "forward", "backward")).median

    def aim(self, args: argparse.Namespace, name: str) -> str:
        at_bar = self.size == BAR_SIZE and all(getattr(args, key) == value for key, value in BAR_OPTIONS.items())
        bar, theirs = BARS.get((self.dtype, self.method), (None, None)) if at_bar else (None, None)
        if name == OURS:
            return common.bar_cell(self.ratio(name, FROZEN).median, bar)
        return f"({theirs:.2f} in the issue)" if name == THEIRS and theirs is not None else ""


def cells(args: argparse.Namespace, device: torch.device) -> Iterator[Cell]:
    for dtype, size in itertools.product(args.dtypes, args.grid):
        m, k, n = size
        torch.manual_seed(0)
        kind = common.DTYPES[dtype]
        base = nn.Sequential()
        base.add_module("proj", nn.Linear(k, n, bias=args.bias, device=device, dtype=kind))
        base.requires_grad_(False)
        x = torch.randn(m, k, device=device, dtype=kind)
        dy = torch.randn(m, n, device=device, dtype=kind)
        for method in args.methods:
            layers = {each.name: each for each in contenders(args, method, base, x, dy)}
            times = common.interleave(list(layers.values()), args.repetitions, args.warmup, args.cpu_time,
                                      args.seconds_per_cell)
            yield Cell(dtype, size, method, layers, times, {name: each.memory() for name, each in layers.items()})
            del layers, times
            gc.collect()


def contenders(args: argparse.Namespace, method: str, base: nn.Module, x: Tensor, dy: Tensor) -> list[Layer]:
    """The frozen layer, ours and peft's; checked."""
    case = METHODS[method]
    sizes = common.Sizes.of(args.rank, (base.proj.in_features, base.proj.out_features))
    with torch.no_grad():
        expected = base.proj(x)
    found = [Layer(FROZEN, FROZEN, base.proj, x, dy)]
    model = veneer.attach(common.sharing_copy(base), case.veneer(sizes))
    found.append(Layer(method, OURS, model.proj, x, dy))
    changes = [None, lambda: attached(model, "default")[0].adapter.delta()]
    for name, cast in ((THEIRS, True), (THEIRS_16, False)):
        if cast or x.dtype != torch.float32:
            wrapped = common.peft_model(common.sharing_copy(base), case.peft(sizes, ["proj"]),
                                        autocast_adapter_dtype=cast)
            layer = wrapped.base_model.model.proj
            found.append(Layer(method, name, layer, x, dy))
            changes.append(lambda layer=layer: layer.get_delta_weight("default"))
    for each, change in zip(found, changes, strict=True):
        with torch.no_grad():
            added = 0 if case.starts_at_zero or change is None else x @ change().to(x.dtype).mT
            each_expected = expected + added
        each.check(each_expected)
    trained = {each.name: sum(p.numel() for p in each.trained) for each in found[1:]}
    if len(set(trained.values())) > 1:
        raise RuntimeError(f"the contenders train different numbers of parameters: {trained}")
    return found


# -- one size: a row for every contender ------------------------------------------------------------------
HEAD = ["dtype", "method", "contender", "ms", "÷ frozen [quartiles]", "÷ peft [quartiles]", "forward ÷", "backward ÷",
        "kept MiB", "peak MiB", "bar"]


def rows(args: argparse.Namespace, cell: Cell, with_frozen: bool) -> list[list[object]]:
    lines: list[list[object]] = []
    for name, memory in cell.memory.items():
        frozen = name == FROZEN
        if frozen and not with_frozen:
            continue
        lines.append([
            cell.dtype, "" if frozen else METHODS[cell.method].label, name, f"{cell.milliseconds(name):.2f}",
            cell.ratio(name, FROZEN), cell.ratio(name, THEIRS) if name == OURS else "",
            f"{cell.ratio(name, FROZEN, 'forward').median:.2f}", f"{cell.ratio(name, FROZEN, 'backward').median:.2f}",
            f"{memory.kept / common.MIB:.2f}", f"{memory.peak / common.MIB:.2f}", cell.aim(args, name)])
    return lines


# -- several sizes: a row for every method ----------------------------------------------------------------
GRID_HEAD = ["dtype", "m", "k → n", "method", "Veneer ms", "Veneer ÷ frozen", "peft ÷ frozen", "peft 16-bit ÷ frozen",
             "Veneer ÷ peft [quartiles]", "Veneer ÷ peft 16-bit [quartiles]", "peak MiB Veneer", "peft", "peft 16-bit",
             "rounds", "bar"]


def grid_row(args: argparse.Namespace, cell: Cell) -> list[object]:
    m, k, n = cell.size
    names = [name for name in (OURS, THEIRS, THEIRS_16) if name in cell.layers]
    blank = [""] * (3 - len(names))
    over = [f"{cell.ratio(name, FROZEN).median:.3f}" for name in names]
    peaks = [f"{cell.memory[name].peak / common.MIB:.1f}" for name in names]
    return [cell.dtype, m, f"{k} → {n}", METHODS[cell.method].label, f"{cell.milliseconds(OURS):.2f}", *over, *blank,
            *(cell.ratio(OURS, name) for name in names[1:]), *blank, *peaks, *blank, cell.repetitions,
            cell.aim(args, OURS)]


def losses(cell: Cell) -> tuple[list[str], list[str]]:
    """Where Veneer was slower than a peft contender, and where it allocated more at once."""
    slower, larger = [], []
    for name in (THEIRS, THEIRS_16):
        if name in cell.layers:
            where = f"{cell.dtype} m={cell.size[0]} {cell.size[1]} → {cell.size[2]} {METHODS[cell.method].label}"
            ratio, peak, bar = cell.ratio(OURS, name), cell.memory[OURS].peak, cell.memory[name].peak
            if ratio.median > 1:
                slower.append(f"- {where}: {ratio} of {name}'s time")
            if peak > bar:
                larger.append(f"- {where}: {peak / bar:.3f} of {name}'s {bar / common.MIB:.2f} MiB")
    return slower, larger


def verdict(slower: Sequence[str], larger: Sequence[str]) -> str:
    parts = []
    for title, found in (("Slower than peft", slower), ("More peak memory than peft", larger)):
        parts.append("\n".join([f"{title}: {len(found)} cells.", "", *found]) if found else f"{title}: nowhere.")
    return "\n\n".join(parts)


def breakdown(each: Layer, repetitions: int) -> str:
    """Time by operation over some repetitions, as torch's profiler sees it."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if each.device.type == "cuda" else [])
    with profile(activities=activities) as recorded:
        for _ in range(repetitions):
            each.run()
            each.x.grad = None
            for p in each.trained:
                p.grad = None
    sort = "self_cuda_time_total" if each.device.type == "cuda" else "self_cpu_time_total"
    return recorded.key_averages(group_by_input_shape=True).table(sort_by=sort, row_limit=20)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--dtypes", nargs="+", choices=list(common.DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--sizes", choices=["default", "all"], default="default",
                        help="default: m=1024, k=n=2048; all: nine sizes from m=128, 576 → 1536 to m=4096, 2048 → 8192")
    parser.add_argument("--m", type=int, nargs="+", help="rows of the input; several: each with every k and n")
    parser.add_argument("--k", type=int, nargs="+", help="width of the input; several: one for every n")
    parser.add_argument("--n", type=int, nargs="+", help="width of the output")
    parser.add_argument("--rank", type=int, default=16, help="of the methods whose row names no rank")
    parser.add_argument("--bias", action="store_true", help="the base layer has a bias")
    parser.add_argument("--repetitions", type=int, help="at most; default 100 for several sizes, else 40")
    parser.add_argument("--seconds-per-cell", type=float,
                        help=f"end a method's measurement after about as many, with at least {common.FEWEST} "
                             "repetitions; default 6 for several sizes, else no limit")
    parser.add_argument("--warmup", type=int, help="untimed repetitions before; default 1 for several sizes, else 3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help=common.CPU_TIME)
    parser.add_argument("--breakdown", action="store_true", help="also print the time by operation")
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    args.grid = _grid(parser, args)
    several = len(args.grid) > 1
    if args.repetitions is None:
        args.repetitions = 100 if several else 40
    if args.warmup is None:
        args.warmup = 1 if several else 3
    if args.seconds_per_cell is None and several:
        args.seconds_per_cell = 6.0
    return args


def _grid(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[tuple[int, int, int]]:
    if args.sizes == "all":
        if args.m or args.k or args.n:
            parser.error("--sizes all has its own --m, --k and --n")
        return list(ALL_SIZES)
    m, k, n = args.m or [BAR_SIZE[0]], args.k or [BAR_SIZE[1]], args.n or [BAR_SIZE[2]]
    if len(k) != len(n):
        parser.error(f"--k and --n go together, one n for every k: got {len(k)} and {len(n)}")
    return [(rows, width, out) for width, out in zip(k, n, strict=True) for rows in m]


def conditions(args: argparse.Namespace) -> str:
    size = "m={}, k={}, n={}, ".format(*args.grid[0]) if len(args.grid) == 1 else ""
    rounds = f"{args.repetitions} interleaved repetitions"
    if args.seconds_per_cell is not None:
        rounds = f"{common.FEWEST} to {rounds} (rounds) in about {args.seconds_per_cell:g} s for each method"
    return (f"{size}r={args.rank} unless the row has its own, {rounds}; the median of paired ratios [quartiles]. "
            "Adapters are fp32 unless it says 16-bit. `kept`: what lives from forward to backward beside the output "
            "(the input counts if the layer holds it, which a frozen one does not). `peak`: the most allocated at "
            "once, input and gradients included. VB-LoRA's vectors are as long as peft takes them, up to 256: a "
            "divisor of k and n."
            f"{common.CPU_TIME_NOTE if args.cpu_time else ''}\n")


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    described = common.machine(device)
    several = len(args.grid) > 1
    lines: list[list[object]] = []
    slower: list[str] = []
    larger: list[str] = []
    for cell in cells(args, device):
        if several:
            lines.append(grid_row(args, cell))
            print(*lines[-1], sep="  ", file=sys.stderr, flush=True)
        else:
            lines += rows(args, cell, with_frozen=cell.method == args.methods[0])
        for found, new in zip((slower, larger), losses(cell), strict=True):
            found += new
        if args.breakdown:
            for name, each in cell.layers.items():
                print(f"\n{cell.dtype} {cell.method} {name}\n{breakdown(each, 5)}")
    shown = common.table(GRID_HEAD if several else HEAD, lines) + "\n\n" + verdict(slower, larger)
    print(shown)
    on = "" if device.type == "cpu" else f" ({device.type})"
    section = ("layer sizes" if several else "layers") + ("" if device.type == "cpu" else f" {device.type}")
    title = f"One linear layer{' of several sizes' if several else ''}{on}"
    common.write_section(args.results, section,
                         common.header(title, argv, "layers.py", conditions(args), described) + "\n" + shown)


if __name__ == "__main__":
    main(sys.argv[1:])
