"""QLoRA on a CPU: adapters over quantised bases learn the demo's task, beside peft over bitsandbytes, step by step.

    python benchmarks/qlora.py [--only nf4 gguf] [--steps 60] [--dtype fp32] [--gradient-checkpointing]

Every contender takes the same steps on the same batches, in turns, so that a slow moment of the machine falls on all of
them. peft is always among them. Each base is made of the same dense model; peft's is loaded by transformers from a
folder that this script writes, with bitsandbytes' NF4 and double quantisation, as QLoRA is usually set up.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own messages would mix with the table
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the demo's model is embedded; nothing is to be looked up

import peft
import torch
import transformers
from torch import Tensor, nn

import common
import veneer
from common import Contender, Memory, Times
from methods import DEMO
from veneer.train import config_file
from veneer.train.batches import Collator, LengthGroupedSampler
from veneer.train.console import Console
from veneer.train.evaluate import Evaluation, evaluate
from veneer.train.gguf_weights import hold_blocks
from veneer.train.job import Job, prepare
from veneer.train.loss import masked_loss
from veneer.train.measure import kl_divergence, logits
from veneer.train.memory import weight_bytes
from veneer.train.model import gguf_path
from veneer.train.settings import parse_settings

PROBE = 16  # held-out examples on which merged and unmerged models are compared
STEP = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Base:
    """A way to hold the base: what makes it of the dense model, in place."""

    label: str
    hold: Callable[[nn.Module, Job], Any]


BASES: dict[str, Base] = {
    "dense": Base("not quantised", lambda model, job: None),
    "nf4": Base("nf4", lambda model, job: veneer.quantize(model, "nf4")),
    "bnb-nf4": Base("bnb-nf4", lambda model, job: veneer.quantize(model, "bnb-nf4")),
    "torchao-int8": Base("torchao-int8", lambda model, job: veneer.quantize(model, "torchao-int8")),
    "gguf": Base("gguf, the file's blocks", lambda model, job: hold_blocks(model, gguf_path(job.settings.model))),
}


# -- contenders -------------------------------------------------------------------------------------------
class Learner(Contender):
    """One adapted model on its way through the demo's batches; a run is one training step."""

    def __init__(self, label: str, name: str, model: Any, base_bytes: int, args: argparse.Namespace, job: Job) -> None:
        super().__init__(label, name, torch.device("cpu"))
        self.model, self.base_bytes, self.job = model.train(), base_bytes, job
        self.batches = batches(job, args.steps)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=args.rate, weight_decay=0.0)
        warmup = round(job.settings.training.warmup_ratio * args.steps)
        self.schedule = transformers.get_cosine_schedule_with_warmup(self.optimizer, warmup, args.steps)
        self.losses: list[float] = []

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        total, count, _ = masked_loss(self.model, batch, keep=True)
        return total / count

    def run(self) -> dict[str, float]:
        batch = self.batches[len(self.losses)]
        start = self.start()
        loss = self.loss(batch)
        middle = self.moment()
        loss.backward()
        end = self.moment()
        torch.nn.utils.clip_grad_norm_(self.trained, self.job.settings.training.max_grad_norm)
        self.optimizer.step()
        spans = {"forward": self.seconds(start, middle), "backward": self.seconds(middle, end),
                 "optimizer": self.seconds(end, self.moment())}
        self.losses.append(loss.item())
        return spans

    def between(self) -> None:
        self.schedule.step()
        self.optimizer.zero_grad()

    def memory(self) -> Memory:
        """What a step on the longest examples allocates, forward and backward."""
        longest = sorted(self.job.train, key=len)[-self.job.settings.training.batch_size:]
        batch = Collator(self.job.encoder.tokenizer.pad_token_id)(longest)
        with common.measure_memory(self.device) as ledger:
            loss = self.loss(batch)
            ledger.forward_done()
            loss.backward()
            del loss
        self.optimizer.zero_grad()
        return ledger.memory

    def heldout(self) -> Evaluation:
        job = self.job
        return evaluate(self.model, job.data.heldout, job.heldout, job.encoder, job.settings.evaluation)

    def merged(self) -> nn.Module:
        """The adapters merged into an ordinary model in 16 bits. The contender cannot go on after this."""
        veneer.merge(self.model, keep=False)
        veneer.detach(self.model)
        veneer.dequantize(self.model)
        kind = torch.bfloat16 if self.model.dtype.itemsize > 2 else self.model.dtype
        return self.model.to(kind)

    def divergence(self) -> float:
        """KL (nats per token) of the merged model's answers from those of the unmerged one, both computed in fp32."""
        probe = Collator(self.job.encoder.tokenizer.pad_token_id)(self.job.heldout[:PROBE])
        inputs = {key: probe[key] for key in ("input_ids", "attention_mask")}
        mask = probe["attention_mask"].bool()
        wide = self.model.dtype == torch.float32
        reference = logits(self.model if wide else self.widened(copy.deepcopy(self.model)), inputs)[mask]
        return kl_divergence(reference, logits(self.widened(self.merged()), inputs)[mask])

    def widened(self, model: nn.Module) -> nn.Module:
        return model.float()


class PeftLearner(Learner):
    def merged(self) -> nn.Module:
        """peft's own way, which packs the merged weights again."""
        return self.model.merge_and_unload()

    def widened(self, model: nn.Module) -> nn.Module:
        return model  # transformers casts no quantised model


def batches(job: Job, steps: int) -> list[dict[str, Tensor]]:
    """The batches of the training command, in its order."""
    training = job.settings.training
    collate = Collator(job.encoder.tokenizer.pad_token_id)
    order = LengthGroupedSampler([len(e) for e in job.train], training.batch_size, training.seed)
    found: list[dict[str, Tensor]] = []
    while len(found) < steps:
        indices = list(order)
        found += [collate([job.train[i] for i in indices[at:at + training.batch_size]])
                  for at in range(0, len(indices), training.batch_size)]
        order.set_epoch(order.epoch + 1)
    return found[:steps]


def contenders(args: argparse.Namespace, job: Job) -> list[Learner]:
    found: list[Learner] = []
    for key in args.only:
        model = copy.deepcopy(job.model)
        BASES[key].hold(model, job)
        size = weight_bytes(model)
        veneer.prepare_for_kbit_training(model, norms=None, gradient_checkpointing=args.gradient_checkpointing)
        veneer.attach(model, veneer.LoRA(rank=args.rank))
        found.append(Learner(BASES[key].label, "Veneer", model, size, args, job))
    model = peft_base(job)
    size = weight_bytes(model)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing,
                                                 gradient_checkpointing_kwargs={"use_reentrant": False})
    config = peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    found.append(PeftLearner("bnb-nf4", "peft", peft.get_peft_model(model, config), size, args, job))
    counts = {sum(p.numel() for p in each.trained) for each in found}
    if len(counts) > 1:
        raise RuntimeError(f"the contenders train different numbers of parameters: {sorted(counts)}")
    return found


def peft_base(job: Job) -> Any:
    dtype = job.model.dtype
    transformers.utils.logging.disable_progress_bar()
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                             bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        job.model.save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype,
                                                                  device_map="cpu")
    model.generation_config = copy.deepcopy(job.model.generation_config)
    for module in model.modules():
        # in evaluation on some CPUs bitsandbytes would pack the weights anew, with scales in bf16, for good
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False
    return model


# -- the table --------------------------------------------------------------------------------------------
HEAD = ["contender", "base", "base MiB", "step s", "÷ peft [quartiles]", "kept MiB", "peak MiB", "training loss",
        "held-out loss", "exact match", "merged as", "merged KL"]


def rows(found: Sequence[Learner], times: Times) -> list[list[object]]:
    theirs = found[-1]
    lines: list[list[object]] = []
    for each in found:
        seconds = common.Spread.of(times.of(each, *STEP)).median
        memory, outcome = each.memory(), each.heldout()
        last = each.losses[-min(10, len(each.losses)):]
        right = f"{outcome.correct}/{len(outcome.answers)}" if outcome.answers else ""
        label = "" if each.name == "peft" else "bf16" if each.model.dtype == torch.float32 else "16 bits"
        lines.append([each.name, each.method, f"{each.base_bytes / common.MIB:.1f}", f"{seconds:.3f}",
                      times.ratio(each, theirs, *STEP), f"{memory.kept / common.MIB:.1f}",
                      f"{memory.peak / common.MIB:.1f}", f"{sum(last) / len(last):.4f}", f"{outcome.loss:.4f}", right,
                      label or "nf4 again", f"{each.divergence():.1e}"])
        print(common.table(HEAD, lines), file=sys.stderr, flush=True)
    return lines


# -- command line -----------------------------------------------------------------------------------------
def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BASES), default=["nf4", "bnb-nf4", "torchao-int8", "gguf"],
                        help="these bases; peft is always there")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate, the demo's by default")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=list(common.DTYPES), default="fp32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--no-generate", action="store_true", help="held-out loss only, no answers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help=common.CPU_TIME)
    parser.add_argument("--config", type=pathlib.Path, default=DEMO, help="another demo than examples/demo.yaml")
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first one is not timed")
    return args


def load(args: argparse.Namespace) -> Job:
    config = config_file.read(args.config)
    model = config["model"] if isinstance(config["model"], dict) else {"name": config["model"]}
    config["model"] = {**model, "dtype": str(common.DTYPES[args.dtype]).removeprefix("torch.")}
    config["adapter"] = {"method": "lora", "rank": args.rank}
    settings = parse_settings(config, args.config.parent)
    if args.no_generate:
        settings = replace(settings, evaluation=replace(settings.evaluation, generate=False))
    with contextlib.redirect_stdout(sys.stderr):
        return prepare(settings, Console())


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    described = common.machine(torch.device("cpu"))
    found = contenders(args, load(args))
    times = common.interleave(found, args.steps - 1, warmup=1, cpu_time=args.cpu_time)
    shown = common.table(HEAD, rows(found, times))
    print(shown)
    conditions = (
        f"{args.config.name}, {args.dtype}, LoRA r={args.rank} on all linears but the head, {args.steps} steps at a "
        f"peak rate of {args.rate:g}, the same batches for all, one step each in turns; medians of paired ratios "
        f"without the first step{', gradient checkpointing' if args.gradient_checkpointing else ''}. `base MiB`: all "
        "base weights as they are held, embeddings included; `kept` and `peak`: allocated by forward and backward of "
        "the longest examples beside that; `training loss`: mean of the last 10 steps; `merged KL`: nats per token on "
        f"{PROBE} held-out examples, merged against unmerged, both computed in fp32 (peft merges into nf4)."
        f"{common.CPU_TIME_NOTE if args.cpu_time else ''}\n")
    whole = args.only == parse([]).only and args.dtype == "fp32" and not args.gradient_checkpointing
    section = "qlora" if whole else " ".join(["qlora", *args.only, args.dtype,
                                              *(["checkpointing"] if args.gradient_checkpointing else [])])
    common.write_section(args.results, section, common.header(
        "QLoRA on a CPU", argv, "qlora.py", conditions, described) + "\n" + shown)


if __name__ == "__main__":
    main(sys.argv[1:])
