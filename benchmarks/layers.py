"""Cost of one adapted linear layer: (forward + backward) ÷ (frozen forward + dX), Veneer beside peft.

    python benchmarks/layers.py [--methods lora dropout dora] [--dtypes bf16 fp32] [--m 1024 --k 2048 --n 2048]

Every contender stands over the same weight and gets the same input, which requires grad as inside a network,
and the same dY. Between repetitions each takes an optimizer step outside the timed span, so nothing kept from
one repetition (a norm, a cast) can serve the next. peft is timed at the layer itself, without its model wrapper.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own messages would mix with the table

import peft
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import common
import veneer
from common import METHODS, Contender, Memory, Times

# (dtype, method) → the bar for Veneer, and what its issue measured for peft, for the default sizes on 2 CPU threads.
BARS = {
    ("bf16", "lora"): (1.25, 1.50), ("bf16", "dropout"): (1.40, 2.84), ("bf16", "dora"): (1.40, 4.98),
    ("fp32", "lora"): (1.08, 1.12), ("fp32", "dropout"): (1.14, 1.39), ("fp32", "dora"): (1.14, 1.77),
}
BAR_SIZES = {"m": 1024, "k": 2048, "n": 2048, "rank": 16, "threads": 2, "bias": False, "device": "cpu"}


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
        """Before the first step, while the update is still zero: the base's output, and every gradient."""
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


def contenders(args: argparse.Namespace, dtype: str, device: torch.device) -> list[Layer]:
    torch.manual_seed(0)
    kind = common.DTYPES[dtype]
    base = nn.Sequential()
    base.add_module("proj", nn.Linear(args.k, args.n, bias=args.bias, device=device, dtype=kind))
    base.requires_grad_(False)
    x = torch.randn(args.m, args.k, device=device, dtype=kind)
    dy = torch.randn(args.m, args.n, device=device, dtype=kind)
    found = [Layer("frozen", "frozen", base.proj, x, dy)]
    for method in args.methods:
        case = METHODS[method]
        model = veneer.attach(common.sharing_copy(base), case.veneer(args.rank))
        found.append(Layer(method, "Veneer", model.proj, x, dy))
        for label, cast in (("peft", True), ("peft, 16-bit adapter", False)):
            if cast or kind != torch.float32:
                wrapped = peft.get_peft_model(common.sharing_copy(base), case.peft(args.rank, ["proj"]),
                                              autocast_adapter_dtype=cast)
                found.append(Layer(method, label, wrapped.base_model.model.proj, x, dy))
    with torch.no_grad():
        expected = base.proj(x)
    for each in found:
        each.check(expected)
    _same_parameters(found)
    return found


def _same_parameters(found: Sequence[Layer]) -> None:
    counts: dict[str, set[int]] = {}
    for each in found:
        counts.setdefault(each.method, set()).add(sum(p.numel() for p in each.trained))
    if any(len(sizes) > 1 for sizes in counts.values()):
        raise RuntimeError(f"the contenders train different numbers of parameters: {counts}")


def rows(args: argparse.Namespace, dtype: str, found: Sequence[Layer], times: Times) -> list[list[object]]:
    frozen = found[0]
    at_bar = all(getattr(args, key) == value for key, value in BAR_SIZES.items())
    lines: list[list[object]] = []
    for each in found:
        total = common.Spread.of(times.of(each, "forward", "backward"))
        ratio = times.ratio(each, frozen, "forward", "backward")
        memory = each.memory()
        bar, theirs = BARS.get((dtype, each.method), (None, None)) if at_bar else (None, None)
        aim = common.bar_cell(ratio.median, bar) if each.name == "Veneer" else ""
        if each.name == "peft" and theirs is not None:
            aim = f"({theirs:.2f} in the issue)"
        label = METHODS[each.method].label if each.method in METHODS else ""
        lines.append([dtype, label, each.name, f"{total.median * 1e3:.2f}", ratio,
                      f"{times.ratio(each, frozen, 'forward').median:.2f}",
                      f"{times.ratio(each, frozen, 'backward').median:.2f}",
                      f"{memory.kept / common.MIB:.2f}", f"{memory.peak / common.MIB:.2f}", aim])
    return lines


HEAD = ["dtype", "method", "contender", "ms", "÷ frozen [quartiles]", "forward ÷", "backward ÷", "kept MiB",
        "peak MiB", "bar"]


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
    parser.add_argument("--m", type=int, default=1024, help="rows of the input")
    parser.add_argument("--k", type=int, default=2048, help="width of the input")
    parser.add_argument("--n", type=int, default=2048, help="width of the output")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--bias", action="store_true", help="the base layer has a bias")
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help=common.CPU_TIME)
    parser.add_argument("--breakdown", action="store_true", help="also print the time by operation")
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    described = common.machine(device)
    lines: list[list[object]] = []
    for dtype in args.dtypes:
        found = contenders(args, dtype, device)
        times = common.interleave(found, args.repetitions, args.warmup, cpu_time=args.cpu_time)
        lines += rows(args, dtype, found, times)
        if args.breakdown:
            for each in found:
                print(f"\n{dtype} {each.method} {each.name}\n{breakdown(each, 5)}")
    conditions = (
        f"m={args.m}, k={args.k}, n={args.n}, r={args.rank}, {args.repetitions} interleaved repetitions; the median "
        "of paired ratios [quartiles]. Adapters are fp32 unless the row says otherwise. `kept`: what lives from "
        "forward to backward beside the output (the input counts if the layer holds it, which a frozen one does "
        "not). `peak`: the most allocated at once, input and gradients included."
        f"{common.CPU_TIME_NOTE if args.cpu_time else ''}\n")
    shown = common.table(HEAD, lines)
    print(shown)
    section = "layers" if device.type == "cpu" else f"layers {device.type}"
    title = f"One linear layer{'' if device.type == 'cpu' else f' ({device.type})'}"
    common.write_section(args.results, section,
                         common.header(title, argv, "layers.py", conditions, described) + "\n" + shown)


if __name__ == "__main__":
    main(sys.argv[1:])
