"""A whole training step of SmolLM2-135M with every linear but the head adapted: Veneer beside peft and the bare base.

    python benchmarks/step.py [--dtypes bf16 fp32] [--methods lora] [--batch 4 --tokens 256] [--model NAME]

The contenders stand over the same base weights. An adapted contender starts from token ids, as in training; the
frozen one runs forward and backward to the embeddings' output, the least that any adapter of the first layer
needs. An AdamW step over the adapters follows each backward pass and is timed apart.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own messages would mix with the table

import torch
from torch import Tensor

import common
import veneer
from common import METHODS, Contender, Memory, Times
from veneer.train.model import load_model
from veneer.train.settings import ModelSettings

# dtype → the bar for Veneer ÷ peft (whole step, LoRA), and what the issue measured for peft ÷ frozen.
BARS = {"bf16": (0.80, 1.59), "fp32": (0.95, 1.19)}
BAR_SIZES = {"model": "smollm2-135m", "batch": 4, "tokens": 256, "rank": 16, "threads": 2, "device": "cpu"}
LEARNING_RATE = 1e-4


class Step(Contender):
    """Forward, backward and optimizer step of one causal language model on one batch of token ids."""

    def __init__(self, method: str, name: str, model: Any, ids: Tensor) -> None:
        super().__init__(method, name, ids.device)
        self.model, self.ids = model.train(), ids
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE) if self.trained else None
        self.losses: list[float] = []

    def loss(self) -> Tensor:
        return self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss

    def run(self) -> dict[str, float]:
        start = self.start()
        loss = self.loss()
        middle = self.moment()
        loss.backward()
        end = self.moment()
        spans = {"forward": self.seconds(start, middle), "backward": self.seconds(middle, end)}
        if self.optimizer is not None:
            end = self.moment()
            self.optimizer.step()
            spans["optimizer"] = self.seconds(end, self.moment())
        self.losses.append(loss.item())
        return spans

    def between(self) -> None:
        for p in self.trained:
            p.grad = None

    def memory(self) -> Memory:
        """Kept from forward to backward, and the peak; the optimizer's state, equal for all, is outside."""
        with common.measure_memory(self.device) as ledger:
            loss = self.loss()
            ledger.forward_done()
            loss.backward()
            del loss
        self.between()
        return ledger.memory


class FrozenStep(Step):
    """The same without adapters: gradients as far as the embeddings' output."""

    def loss(self) -> Tensor:
        inputs = self.model.get_input_embeddings()(self.ids).detach().requires_grad_()
        return self.model(inputs_embeds=inputs, labels=self.ids, use_cache=False).loss


def contenders(args: argparse.Namespace, dtype: str, device: torch.device) -> list[Step]:
    base = load(args.model, dtype).to(device).requires_grad_(False)
    drawn = torch.randint(base.config.vocab_size, (args.batch, args.tokens), generator=torch.Generator().manual_seed(0))
    ids = drawn.to(device)
    linears = [m for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not base.get_output_embeddings()]
    sizes = common.Sizes.of(args.rank, [width for m in linears for width in (m.in_features, m.out_features)])
    found: list[Step] = [FrozenStep("frozen", "frozen", common.sharing_copy(base), ids)]
    for method in args.methods:
        case = METHODS[method]
        found.append(Step(method, "Veneer", veneer.attach(common.sharing_copy(base), case.veneer(sizes)), ids))
        wrapped = common.peft_model(common.sharing_copy(base), case.peft(sizes, "all-linear"))
        found.append(Step(method, "peft", wrapped, ids))
    return found


def load(name: str, dtype: str) -> Any:
    """The base model on the CPU; `tiny` is a Llama of two layers with random weights, for trying this script."""
    if name != "tiny":
        return load_model(ModelSettings(name=name, dtype=str(common.DTYPES[dtype]).removeprefix("torch."))).model
    import transformers

    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(common.DTYPES[dtype])


def check(found: Sequence[Step]) -> None:
    """All start at the base's loss and train the same number of parameters, or the comparison means nothing."""
    first = {f"{each.name} {each.method}": each.losses[0] for each in found}
    expected = found[0].losses[0]
    if any(abs(loss - expected) > 0.02 * expected for loss in first.values()):
        raise RuntimeError(f"the contenders do not start at the same loss: {first}")
    for method in {each.method for each in found}:
        sizes = {each.name: sum(p.numel() for p in each.trained) for each in found if each.method == method}
        if len(set(sizes.values())) > 1:
            raise RuntimeError(f"the contenders train different numbers of parameters: {sizes}")


HEAD = ["dtype", "method", "contender", "step s", "tokens/s", "step ÷ peft [quartiles]", "step ÷ frozen [quartiles]",
        "fwd+bwd ÷ frozen", "kept MiB", "peak MiB", "bar"]
STEP = ("forward", "backward", "optimizer")


def rows(args: argparse.Namespace, dtype: str, found: Sequence[Step], times: Times) -> list[list[object]]:
    frozen = found[0]
    theirs = {each.method: each for each in found if each.name == "peft"}
    memory = {each: each.memory() for each in found}
    at_bar = all(getattr(args, key) == value for key, value in BAR_SIZES.items())
    lines: list[list[object]] = []
    for each in found:
        seconds = common.Spread.of(times.of(each, *STEP)).median
        peer = theirs.get(each.method)
        beside = times.ratio(each, peer, *STEP) if peer is not None else None
        bar, known = BARS.get(dtype, (None, None)) if at_bar and each.method == "lora" else (None, None)
        aim = ""
        if each.name == "Veneer" and beside is not None and peer is not None and bar is not None:
            less = "no more" if memory[each].peak <= memory[peer].peak else "MORE"
            aim = f"÷ peft {common.bar_cell(beside.median, bar)}; {less} peak memory"
        if each.name == "peft" and known is not None:
            aim = f"(÷ frozen {known:.2f} in the issue)"
        label = METHODS[each.method].label if each.method in METHODS else ""
        lines.append([dtype, label, each.name, f"{seconds:.3f}", f"{args.batch * args.tokens / seconds:.0f}",
                      beside if beside is not None else "", times.ratio(each, frozen, *STEP),
                      f"{times.ratio(each, frozen, 'forward', 'backward').median:.3f}",
                      f"{memory[each].kept / common.MIB:.2f}", f"{memory[each].peak / common.MIB:.2f}", aim])
    return lines


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="as in a training config, or `tiny`")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["lora"])
    parser.add_argument("--dtypes", nargs="+", choices=list(common.DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of each sequence")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help=common.CPU_TIME)
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    if args.warmup < 1:
        parser.error("--warmup must be at least 1: the first round also checks that the contenders agree")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    described = common.machine(device)
    lines: list[list[object]] = []
    for dtype in args.dtypes:
        found = contenders(args, dtype, device)
        times = common.interleave(found, args.repetitions, args.warmup, cpu_time=args.cpu_time)
        check(found)
        lines += rows(args, dtype, found, times)
    conditions = (
        f"{args.model}, all linears but the head, r={args.rank}, {args.batch} sequences of {args.tokens} tokens, "
        f"{args.repetitions} interleaved repetitions; medians of paired ratios. `step` is forward, backward and the "
        "AdamW step over the adapters (the frozen base has none, and goes back as far as the embeddings' output). "
        "Adapters are fp32 in Veneer and peft, each in its default setting. `kept`: allocated by the forward and "
        "alive until the backward; `peak`: the most allocated at once by forward and backward. Neither counts the "
        "base weights and the optimizer's state, the same for all."
        f"{common.CPU_TIME_NOTE if args.cpu_time else ''}\n")
    shown = common.table(HEAD, lines)
    print(shown)
    on = "" if device.type == "cpu" else f" {device.type}"
    common.write_section(args.results, f"step{on}", common.header(
        f"A whole training step{on}", argv, "step.py", conditions, described) + "\n" + shown)


if __name__ == "__main__":
    main(sys.argv[1:])
