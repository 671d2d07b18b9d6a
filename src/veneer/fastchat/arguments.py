"""FastChat's arguments as dataclasses, and their flags: names and defaults of fastchat/train/train_lora.py."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers

from veneer.fastchat.flags import Flag, foreign_flags, joined, renewed, split
from veneer.method import VeneerError, nearest

BIASES, TEMPLATES, MALFORMED, SIDES = ("none", "all", "lora_only"), ("vicuna", "model"), ("error", "skip"), \
    ("right", "left")


@dataclass
class ModelArguments:
    """The base model."""

    model_name_or_path: str | None = field(default="facebook/opt-125m", metadata={
        "help": "A Hugging Face model, a local folder, a .gguf file, or smollm2-135m for the embedded one."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow Python code that comes with the model."})
    padding_side: str = field(default="right", metadata={"help": "On which side batches are padded: right or left."})

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise VeneerError("--model_name_or_path is empty: give a Hugging Face model, a folder or smollm2-135m")
        _choice("padding_side", self.padding_side, SIDES)


@dataclass
class DataArguments:
    """Conversations in ShareGPT's form."""

    data_path: str | None = field(default=None, metadata={"help": "Training conversations, .json or .jsonl."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Held-out conversations."})
    lazy_preprocess: bool = field(default=False, metadata={
        "help": "Make tokens of a conversation when it is first needed, not all of them at the start."})


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' own, with FastChat's additions. Without an accelerator it trains on the CPU, unasked."""

    cache_dir: str | None = field(default=None, metadata={"help": "Folder for models of the Hugging Face Hub."})
    optim: str = field(default="adamw_torch", metadata={"help": "The optimizer, by transformers' name."})
    model_max_length: int = field(default=512, metadata={"help": "Longer conversations are cut to this many tokens."})
    flash_attn: bool = field(default=False, metadata={
        "help": "Use the package flash-attn where it is installed, else PyTorch's own fused attention."})

    def __post_init__(self) -> None:
        if self.model_max_length < 1:
            raise VeneerError(f"--model_max_length must be at least 1, got {self.model_max_length}")
        check_deepspeed(self.deepspeed)
        # said aloud: else bf16 is refused, and several CPU processes train side by side
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()
        # one process drives one device: replicas made by DataParallel would not share the adapters' route
        self._n_gpu = min(self.n_gpu, 1)


STAGE_3 = ("--deepspeed: stage 3 of ZeRO takes weights apart in a way that adapters in place do not know; use stage 2, "
           "or --fsdp \"full_shard auto_wrap\", which shards the base too")


def check_deepspeed(config: str | Mapping[str, Any] | None) -> None:
    """Raise `VeneerError` for a configuration that is not taken, and where the library is missing, in this order: who
    installs it first would be told afterwards that it was for nothing."""
    if not config:
        return
    if isinstance(config, str):
        try:
            config = json.loads(config if config.lstrip().startswith("{") else Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            config = {}  # the library tells what is wrong with it, and has a third form
    zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
    if isinstance(zero, Mapping) and zero.get("stage") == 3:
        raise VeneerError(STAGE_3)
    if importlib.util.find_spec("deepspeed") is None:
        raise VeneerError("--deepspeed needs the library deepspeed, which is not installed: pip install deepspeed, or "
                          "drop the flag (a frozen base needs little beside its own memory; --fsdp shards that)")


@dataclass
class LoraArguments:
    """The adapter."""

    lora_r: int = field(default=8, metadata={"help": "The rank."})
    lora_alpha: int = field(default=16, metadata={"help": "The scale is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"], metadata={
        "help": "Names of layers, or the ends of names, separated by spaces; all-linear for every linear layer but the "
                "output head."})
    lora_weight_path: str = field(default="", metadata={"help": "An adapter to go on from."})
    lora_bias: str = field(default="none", metadata={
        "help": "Which biases are trained too: none, all, or lora_only (those of the adapted layers)."})
    q_lora: bool = field(default=False, metadata={"help": "Hold the base's linear weights in 4 bits (NF4)."})

    def __post_init__(self) -> None:
        _choice("lora_bias", self.lora_bias, BIASES)
        if self.lora_r < 1:
            raise VeneerError(f"--lora_r must be at least 1, got {self.lora_r}")
        if not 0 <= self.lora_dropout < 1:
            raise VeneerError(f"--lora_dropout must be at least 0 and below 1, got {self.lora_dropout}")
        if not self.lora_target_modules:
            raise VeneerError("--lora_target_modules is empty: name layers, such as q_proj v_proj, or all-linear")


@dataclass
class VeneerArguments:
    """What FastChat has no flag for."""

    conversation_template: str = field(default="vicuna", metadata={
        "help": "How a conversation is written out: vicuna (FastChat's v1.1), or model, by the model's chat template."})
    malformed: str = field(default="error", metadata={
        "help": "What to do with conversations that cannot be used: error, or skip, which leaves them out and names "
                "them."})

    def __post_init__(self) -> None:
        _choice("conversation_template", self.conversation_template, TEMPLATES)
        _choice("malformed", self.malformed, MALFORMED)


@dataclass(kw_only=True)
class Arguments:
    """Everything that one command says. given: the flags that were there; notes: what to tell of them."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    lora: LoraArguments
    own: VeneerArguments = field(default_factory=VeneerArguments)
    given: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


_PARTS: Any = (ModelArguments, DataArguments, TrainingArguments, LoraArguments, VeneerArguments)


class _Parser(transformers.HfArgumentParser):
    """Errors are ours: the usage of more than a hundred flags would hide them."""

    def error(self, message: str) -> NoReturn:
        raise VeneerError(message)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """The arguments of `veneer train` in FastChat's flags. Raises `VeneerError` for an unknown flag, a value that does
    not fit, one of the flags that belong to a YAML file, and what transformers' TrainingArguments refuses."""
    parser = _Parser(_PARTS, prog="veneer train", allow_abbrev=False)
    known = {text for action in parser._actions for text in action.option_strings}
    loose, flags = split(argv, _switches(parser))
    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    flags, notes = renewed(flags, names)
    foreign_flags(loose, flags, known)
    try:
        *parts, rest = parser.parse_args_into_dataclasses(joined(flags), return_remaining_strings=True,
                                                          look_for_args_file=False)
    except VeneerError:
        raise
    except (ValueError, ImportError, OSError) as error:
        raise VeneerError(str(error)) from error
    if rest:
        raise VeneerError(f"{rest[0]!r} is the value of no flag; a flag takes one value, and only "
                          "--lora_target_modules and a few others take several")
    model, data, training, lora, own = parts
    given = _given(flags)
    return Arguments(model=model, data=data, training=training, lora=lora, own=own, given=given,
                     notes=(*notes, *_taken(model, training, given)))


def _switches(parser: _Parser) -> set[str]:
    """Names of the flags that are True or False."""
    return {text.lstrip("-").replace("-", "_") for action in parser._actions for text in action.option_strings
            if action.const is not None or action.nargs == 0}


def _taken(model: ModelArguments, training: TrainingArguments, given: Collection[str]) -> tuple[str, ...]:
    """Where a default decides something that nobody would guess."""
    found = {"model_name_or_path": f"{model.model_name_or_path}, FastChat's default, is taken",
             "output_dir": f"everything is written to {training.output_dir!r}, transformers' default"}
    return tuple(f"--{name} is not given: {text}" for name, text in found.items() if name not in given)


def _given(flags: Sequence[Flag]) -> frozenset[str]:
    return frozenset(flag.name for flag in flags)


def _choice(name: str, value: str, possible: Sequence[str]) -> None:
    if value not in possible:
        raise VeneerError(f"--{name} is {value!r}; possible: {', '.join(possible)}{nearest(str(value), possible)}")
