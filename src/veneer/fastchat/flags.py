"""The words of a command: which are flags, which flags have other names today, which belong to a YAML file."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from veneer.method import VeneerError, nearest
from veneer.train.yaml_flags import YAML_FLAGS

# flags of transformers 4, which FastChat's scripts have → their names today
_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
}
# flags that transformers will drop → what it has beside them
_REPLACED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_OF_FSDP = {"fsdp_transformer_layer_cls_to_wrap": "transformer_layer_cls_to_wrap",
            "fsdp_min_num_params": "min_num_params"}
# flags without an effect today → why
_IDLE = {
    "overwrite_output_dir": "nothing asks for it; a checkpoint in the output directory is gone on from, unless "
                            "--resume_from_checkpoint False starts anew",
    "save_safetensors": "adapters are always saved as safetensors",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR has taken its place",
}
# names that other tools have → the flag that is likely meant, where the letters come nearest to another one
_ELSEWHERE = {
    "lora_rank": "lora_r", "rank": "lora_r", "r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout",
    "lora_target": "lora_target_modules", "target": "lora_target_modules", "lora_modules": "lora_target_modules",
    "bias": "lora_bias", "adapter": "lora_weight_path", "adapter_name_or_path": "lora_weight_path",
    "model": "model_name_or_path", "model_name": "model_name_or_path", "base": "model_name_or_path",
    "dataset": "data_path", "data": "data_path", "load_in_4bit": "q_lora", "quantize": "q_lora",
    "lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size",
    "max_length": "model_max_length", "max_seq_length": "model_max_length", "cutoff_len": "model_max_length",
    "template": "conversation_template", "output": "output_dir",
}  # fmt: skip


@dataclass(frozen=True)
class Flag:
    """`name` without dashes, by underscores; the words that follow it."""

    name: str
    values: tuple[str, ...] = ()
    written: str = ""  # as it stood in the command


def split(argv: Sequence[str], switches: Collection[str] = ()) -> tuple[list[str], list[Flag]]:
    """(the words that are of no flag, the flags).

    switches: names of flags that are True or False. A YAML file is of no flag behind those, nor behind the value of
    another: a command means the same in any order.
    """
    loose: list[str] = []
    flags: list[Flag] = []
    for word in argv:
        if word.startswith("--") or word == "-h":
            written, equals, value = word.partition("=")
            name = "help" if written == "-h" else written[2:].replace("-", "_")
            flags.append(Flag(name, (value,) if equals else (), written))
        elif flags and not (_is_yaml(word) and (flags[-1].values or flags[-1].name in switches)):
            flags[-1] = replace(flags[-1], values=(*flags[-1].values, word))
        else:
            loose.append(word)
    return loose, flags


def _is_yaml(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


def joined(flags: Sequence[Flag]) -> list[str]:
    """The words of a command again."""
    return [word for flag in flags for word in (f"--{flag.name}", *flag.values)]


def renewed(flags: Sequence[Flag], known: Collection[str]) -> tuple[list[Flag], tuple[str, ...]]:
    """Flags of older versions of transformers by the names of the one that is installed, and what to tell of them.

    known: the fields of its TrainingArguments; what it still has stays as it is.
    """
    found: list[Flag] = []
    notes: list[str] = []
    fsdp: dict[str, object] = {}
    for flag in flags:
        new = _REPLACED.get(flag.name) or (None if flag.name in known else _RENAMED.get(flag.name))
        if new is not None and new in known:
            found.append(replace(flag, name=new))
        elif flag.name in known:
            found.append(flag)
        elif flag.name == "warmup_ratio":
            found += _warmup(flag, flags)
        elif flag.name == "group_by_length":
            on = _switch(flag)
            found += [replace(flag, name="train_sampling_strategy", values=("group_by_length",))] if on else []
        elif flag.name in _OF_FSDP:
            value = _only(flag)
            name = _OF_FSDP[flag.name]
            fsdp[name] = int(value) if name == "min_num_params" and value.isdigit() else value
        elif flag.name in _IDLE:
            notes.append(f"{flag.written} has no effect: {_IDLE[flag.name]}")
        else:
            found.append(flag)
    return (_with_fsdp(found, fsdp) if fsdp else found), tuple(notes)


def _warmup(flag: Flag, flags: Sequence[Flag]) -> list[Flag]:
    """A share of the steps: `warmup_steps` below 1 is one. A number of steps that is given too has precedence."""
    value = _only(flag)
    try:
        ratio = float(value)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise VeneerError(f"{flag.written} must be a number from 0 to 1, got {value!r}")
    if ratio == 1:
        raise VeneerError(f"{flag.written} 1 would warm up to the very end; give a share below 1, or --warmup_steps")
    steps = [other for other in flags if other.name == "warmup_steps" and other.values[:1] not in ((), ("0",))]
    return [] if steps else [replace(flag, name="warmup_steps")]


def _with_fsdp(flags: list[Flag], options: dict[str, object]) -> list[Flag]:
    """The flags with `options` in `fsdp_config`. Raises `VeneerError` where that is a file."""
    for number, flag in enumerate(flags):
        if flag.name == "fsdp_config":
            value = _only(flag)
            if not value.startswith("{"):
                raise VeneerError(f"--fsdp_config is the file {value!r}; write {', '.join(options)} into it, instead "
                                  "of giving a flag for it")
            flags[number] = replace(flag, values=(json.dumps({**json.loads(value), **options}),))
            return flags
    return [*flags, Flag("fsdp_config", (json.dumps(options),), "--fsdp_config")]


def _only(flag: Flag) -> str:
    if len(flag.values) != 1:
        raise VeneerError(f"{flag.written} takes one value, got {len(flag.values)}")
    return flag.values[0]


def _switch(flag: Flag) -> bool:
    value = flag.values[0].lower() if flag.values else "true"
    if value not in ("true", "false", "1", "0", "yes", "no"):
        raise VeneerError(f"{flag.written} must be True or False, got {flag.values[0]!r}")
    return value in ("true", "1", "yes")


def foreign_flags(loose: Sequence[str], flags: Sequence[Flag], known: Collection[str]) -> None:
    """Raise `VeneerError` for words that do not belong among FastChat's flags; `known` are those with their dashes."""
    unknown = [flag for flag in flags if f"--{flag.name}" not in known]
    mine = [flag.written for flag in flags if f"--{flag.name}" in known and flag.name != "help"]
    of_yaml = [flag.written for flag in unknown if "--" + flag.name.replace("_", "-") in YAML_FLAGS]
    other = [flag.written for flag in unknown if flag.written not in of_yaml]
    if other:
        told = " ".join(f"unknown flag {written}{_likely(written, known) or '.'}" for written in other)
        raise VeneerError(f"{told} `veneer train --model_name_or_path X --help` lists FastChat's flags and "
                          "transformers', `veneer train --help` those beside a YAML file")
    if (loose or of_yaml) and mine:
        what = f"the file {loose[0]!r}" if loose else of_yaml[0]
        raise VeneerError(f"{what} belongs to a run from a YAML file, and {mine[0]} is a flag of "
                          "FastChat's; give either the YAML file (with --set for single settings) or the flags")


def _likely(written: str, known: Collection[str]) -> str:
    """What is likely meant by an unknown flag, as `nearest` says it."""
    name = _ELSEWHERE.get(written.lstrip("-").replace("-", "_"))
    return f"; did you mean '--{name}'?" if name else nearest(written, [*known, *YAML_FLAGS])
