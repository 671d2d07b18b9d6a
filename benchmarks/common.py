"""What the benchmarks share: the methods compared, fair timing, exact memory, and the report.

Timing: every repetition runs all contenders once, in a fresh random order, and each repetition gives one
ratio per contender; what is reported is the median of those paired ratios with its quartiles, so that a
slow moment of a shared machine falls on both sides of a ratio or is voted down.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import gc
import json
import math
import os
import pathlib
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import peft
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import veneer

RESULTS = pathlib.Path(__file__).with_name("RESULTS.md")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIB = 2**20
FEWEST = 5  # repetitions, where a time limit decides on their number
CPU_TIME = "count the process's own CPU seconds instead of wall time: for a busy machine, with --threads 1"
CPU_TIME_NOTE = " Times are CPU seconds of the process, not wall time."


class Sizes(NamedTuple):
    """What a method is told of the layers: the rank for those that take it, and the length of VB-LoRA's vectors."""

    rank: int
    length: int

    @classmethod
    def of(cls, rank: int, widths: Iterable[int]) -> Sizes:
        """The longest vectors of at most 256 (a power of two) that divide every width, as peft demands."""
        common = math.gcd(*widths)
        return cls(rank, math.gcd(common, 256))


@dataclass(frozen=True)
class Case:
    """One method, in Veneer's words and in peft's: `veneer(sizes)`, `peft(sizes, target_modules)`."""

    label: str
    veneer: Callable[[Sizes], Any]
    peft: Callable[[Sizes, Any], Any]
    starts_at_zero: bool = True


def _lora(s: Sizes, on: Any, **options: Any) -> Any:
    return peft.LoraConfig(r=s.rank, lora_alpha=2 * s.rank, target_modules=on, **options)


# A scale of exactly 1 would let a contender skip the multiplication: alpha = 2·rank on both sides, where there is one.
METHODS: dict[str, Case] = {
    "lora": Case("LoRA", lambda s: veneer.LoRA(rank=s.rank, alpha=2 * s.rank), _lora),
    "dropout": Case("LoRA, dropout 0.05", lambda s: veneer.LoRA(rank=s.rank, alpha=2 * s.rank, dropout=0.05),
                    lambda s, on: _lora(s, on, lora_dropout=0.05)),
    # Beside peft's plain LoRA, whose work peft's PiSSA does too: it has changed the base instead.
    "pissa": Case("LoRA, pissa", lambda s: veneer.LoRA(rank=s.rank, alpha=2 * s.rank, init="pissa_niter_4"), _lora),
    "dora": Case("DoRA", lambda s: veneer.DoRA(veneer.LoRA(rank=s.rank, alpha=2 * s.rank)),
                 lambda s, on: _lora(s, on, use_dora=True)),
    # All triplets are still there: the layer as it is before the first is pruned.
    "adalora": Case("AdaLoRA", lambda s: veneer.AdaLoRA(init_r=s.rank, target_r=s.rank, alpha=2 * s.rank,
                                                       total_step=10**6),
                    lambda s, on: peft.AdaLoraConfig(init_r=s.rank, target_r=s.rank, lora_alpha=2 * s.rank,
                                                     total_step=10**6, target_modules=on)),
    "loha": Case("LoHa, r=8", lambda s: veneer.LoHa(rank=8, alpha=16),
                 lambda s, on: peft.LoHaConfig(r=8, alpha=16, target_modules=on)),
    "lokr": Case("LoKr, r=8", lambda s: veneer.LoKr(rank=8, alpha=16),
                 lambda s, on: peft.LoKrConfig(r=8, alpha=16, target_modules=on)),
    "vblora": Case("VB-LoRA, r=4", lambda s: veneer.VBLoRA(rank=4, vector_length=s.length),
                   lambda s, on: peft.VBLoRAConfig(r=4, num_vectors=256, vector_length=s.length, target_modules=on),
                   starts_at_zero=False),
    "vera": Case("VeRA, r=256", lambda s: veneer.VeRA(rank=256),
                 lambda s, on: peft.VeraConfig(r=256, target_modules=on)),
    "randlora": Case("RandLoRA, r=32", lambda s: veneer.RandLoRA(rank=32),
                     lambda s, on: peft.RandLoraConfig(r=32, target_modules=on)),
}


# -- contenders -------------------------------------------------------------------------------------------
class Contender:
    """Something that is timed. `method` and `name` label its row; spans are timed on `device`."""

    def __init__(self, method: str, name: str, device: torch.device) -> None:
        self.method, self.name, self.device = method, name, device
        self.cpu_time = False

    def run(self) -> dict[str, float]:
        """One repetition: the seconds of each timed span, by name. Gradients are None before and after."""
        raise NotImplementedError

    def between(self) -> None:
        """Outside the timed spans, after each run: update the parameters, drop the gradients."""

    def start(self) -> Any:
        """A moment at which the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.moment()

    def moment(self) -> Any:
        """A moment; on CUDA an event in the stream, since waiting here would add what a real step does not pay."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.process_time() if self.cpu_time else time.perf_counter()

    def seconds(self, since: Any, until: Any) -> float:
        if self.device.type == "cuda":
            until.synchronize()
            return since.elapsed_time(until) / 1e3
        return until - since


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules over the same parameters and buffers: contenders share one base in memory."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def peft_model(model: nn.Module, config: Any, **options: Any) -> nn.Module:
    """peft's wrapper around `model`, with what its method trains trainable, and nothing else."""
    wrapped = peft.get_peft_model(model, config, **options)
    for name, parameter in wrapped.named_parameters():
        if ".ranknum." in name:  # AdaLoRA's count of triplets, which peft leaves trainable over a 16-bit base
            parameter.requires_grad_(False)
    return wrapped


class Times:
    """Seconds per repetition: `spans[contender][span name]` is a list, one entry per repetition."""

    def __init__(self, contenders: Sequence[Contender]) -> None:
        self.spans: dict[Contender, dict[str, list[float]]] = {c: {} for c in contenders}

    def add(self, contender: Contender, spans: Mapping[str, float]) -> None:
        for name, seconds in spans.items():
            self.spans[contender].setdefault(name, []).append(seconds)

    def of(self, contender: Contender, *names: str) -> list[float]:
        """The sum of the named spans (one the contender does not have counts as 0), per repetition."""
        have = [self.spans[contender][n] for n in names if n in self.spans[contender]]
        return [sum(each) for each in zip(*have, strict=True)]

    def ratio(self, contender: Contender, base: Contender, *names: str) -> Spread:
        """contender ÷ base, paired by repetition."""
        pairs = zip(self.of(contender, *names), self.of(base, *names), strict=True)
        return Spread.of([a / b for a, b in pairs])


class Spread(NamedTuple):
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Python's cyclic collector off: its pauses would fall on whoever runs at the moment."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def interleave(contenders: Sequence[Contender], repetitions: int, warmup: int, cpu_time: bool = False,
               seconds: float | None = None) -> Times:
    """Run all contenders round-robin, in a new order every round, `warmup` rounds untimed.

    seconds: end after about as many, with at least `FEWEST` timed rounds and at most `repetitions`.
    """
    order = random.Random(0)
    for contender in contenders:
        contender.cpu_time = cpu_time
    times = Times(contenders)
    for round_ in range(warmup + repetitions):
        done = round_ - warmup
        if done == 0:
            began = time.perf_counter()
        elif done >= FEWEST and seconds is not None and (time.perf_counter() - began) * (done + 1) / done > seconds:
            break
        with no_collection():
            for contender in order.sample(contenders, len(contenders)):
                spans = contender.run()
                contender.between()
                if done >= 0:
                    times.add(contender, spans)
    return times


# -- memory -----------------------------------------------------------------------------------------------
@dataclass
class Memory:
    """Bytes allocated since the start of a step. `kept` lives from the forward to the backward."""

    kept: int
    peak: int


@dataclass
class Ledger:
    """Reads off a running measurement; `forward_done` is called between forward and backward."""

    device: torch.device
    forward_done: Callable[[], None]
    memory: Memory = field(default_factory=lambda: Memory(0, 0))


@contextlib.contextmanager
def measure_memory(device: torch.device) -> Iterator[Ledger]:
    """Exact bytes allocated by torch inside the context: its profiler's record on the CPU, its counters on CUDA.

    Not seen: scratch space a math library takes for itself, the same for every contender.
    """
    measured = _cuda_memory(device) if device.type == "cuda" else _cpu_memory(device)
    with measured as ledger:
        yield ledger


@contextlib.contextmanager
def _cuda_memory(device: torch.device) -> Iterator[Ledger]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)

    def forward_done() -> None:
        ledger.memory.kept = torch.cuda.memory_allocated(device) - start

    ledger = Ledger(device, forward_done)
    yield ledger
    torch.cuda.synchronize(device)
    ledger.memory.peak = torch.cuda.max_memory_allocated(device) - start


_MARK = "benchmark: forward done"


@contextlib.contextmanager
def _cpu_memory(device: torch.device) -> Iterator[Ledger]:
    def forward_done() -> None:
        with record_function(_MARK):
            pass

    ledger = Ledger(device, forward_done)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield ledger
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    moments = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    mark = next(e["ts"] for e in events if e.get("name") == _MARK)
    live = 0
    for when, size in moments:
        live += size
        ledger.memory.peak = max(ledger.memory.peak, live)
        if when <= mark:
            ledger.memory.kept = live


# -- report -----------------------------------------------------------------------------------------------
def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table with aligned columns, readable as it stands."""
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


def machine(device: torch.device) -> str:
    """The kind of machine and the versions, in one line; nothing that identifies the machine."""
    name = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        named = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = named[0].split(":", 1)[1].strip() if named else name
    parts = [f"{name}, {os.cpu_count()} cores ({torch.backends.cpu.get_cpu_capability()})",
             f"{torch.get_num_threads()} threads"]
    if device.type == "cuda":
        parts.insert(0, torch.cuda.get_device_name(device))
    if sys.platform != "win32":
        parts.append(f"load {os.getloadavg()[0]:.1f} at the start")
    parts.append(f"torch {torch.__version__}, peft {peft.__version__}, veneer {veneer.__version__}")
    return "; ".join(parts)


def command(argv: Sequence[str], script: str) -> str:
    """The command as it was given, less where the results went."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if not skip and not word.startswith("--results"):
            kept.append(word)
        skip = word == "--results"
    return shlex.join(["python", f"benchmarks/{script}", *kept])


def write_section(path: pathlib.Path, section: str, body: str) -> None:
    """Replace (or append) one script's section of the results file; the other sections stay as they are."""
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    text = path.read_text() if path.exists() else "# Benchmark results\n\nWritten by the scripts beside this file.\n"
    block = f"{begin}\n{body.strip()}\n{end}"
    if begin in text and end in text:
        before, rest = text.split(begin, 1)
        text = before + block + rest.split(end, 1)[1]
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def header(title: str, argv: Sequence[str], script: str, conditions: str, described: str) -> str:
    date = datetime.date.today().isoformat()
    return f"## {title}\n\n{date}; {described}.\n\n    {command(argv, script)}\n\n{conditions}\n"


def bar_cell(value: float | None, bar: float | None) -> str:
    """`≤ 1.25 met`, `≤ 1.25 missed`, or empty where the issue sets no bar."""
    if value is None or bar is None:
        return ""
    return f"≤ {bar:.2f} {'met' if value <= bar else 'missed'}"
