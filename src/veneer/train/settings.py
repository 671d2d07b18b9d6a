"""The settings of `veneer train`: one dataclass for each section of the YAML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from veneer.method import Method, VeneerError, method_class, method_from_dict, method_names, nearest
from veneer.train import config_file, quantised
from veneer.train.schema import ConfigError, build, option, override
from veneer.train.settings_checks import check_together


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    name: str = option("", "A Hugging Face model or local folder, or smollm2-135m for the embedded one.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "auto", "Number type of the base weights; auto takes the file's."
    )
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = option(
        None, "Attention implementation of transformers; null leaves the choice to it."
    )
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hugging Face Hub.")
    trust_remote_code: bool = option(False, "Allow Python code that comes with the model.")
    cache_dir: str | None = option(None, "Folder for models of the Hugging Face Hub; null takes its own.")
    quantize: str | dict[str, Any] | None = option(  # noqa: RUF009
        None, "Hold the linear weights in fewer bits: a scheme such as nf4, or {scheme: nf4, …} with its options."
    )
    keep_dense_mb: float = option(
        0.0, "Keep so many MiB of weights that were just read from fewer bits for the backward pass.", minimum=0.0
    )


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    name: str = "default"
    seed: int = 0
    #: what `veneer.plan` and `veneer.attach` take: pattern → method or None, or one method for all linear weights
    rules: Mapping[str, Method | None] | Method


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    train: str | list[str] | None = option(None, "Training files (.jsonl, .json, .csv).")  # noqa: RUF009
    heldout: str | list[str] | None = option(None, "Held-out files; never trained on.")  # noqa: RUF009
    heldout_share: float = option(
        0.0, "Without held-out files: this share of the training rows is held out.", minimum=0.0, maximum=0.9
    )
    generator: str | None = option(
        None, "Instead of files: a Python file with train(seed, …) and heldout(seed, …), each returning rows."
    )
    generator_options: dict[str, Any] = option(  # noqa: RUF009
        dict, "Further arguments of the generator, as {train: {…}, heldout: {…}}."
    )
    train_on: Literal["answers", "everything"] = option(
        "answers", "Which tokens carry loss: the assistant's turns (completions), or all. Plain text: always all."
    )
    system: str | None = option(None, "System message put before every chat that has none.")
    chat_template: str | None = option(None, "A Jinja file to use instead of the tokenizer's chat template.")
    max_length: int = option(1024, "Longest example, in tokens.", minimum=8)
    too_long: Literal["truncate", "skip", "error"] = option(
        "truncate", "What to do with a longer one: cut its end, leave it out (counted and told), or stop."
    )


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    epochs: float = option(1.0, "Passes over the training data.", minimum=0.0)
    max_steps: int | None = option(None, "Stop after this many optimizer steps; overrides epochs.", minimum=1)
    max_minutes: float | None = option(
        None, "Stop when training took this long; a slow run follows the schedule by the clock.", minimum=0.0
    )
    batch_size: int = option(8, "Examples in one forward pass, per device.", minimum=1)
    gradient_accumulation: int = option(1, "Forward passes per optimizer step.", minimum=1)
    learning_rate: float = option(2e-4, "Peak learning rate.", minimum=0.0)
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = option(
        "cosine", "Course of the learning rate."
    )
    warmup_ratio: float = option(0.05, "Share of the steps in which it rises from 0.", minimum=0.0, maximum=1.0)
    weight_decay: float = option(0.0, "AdamW's weight decay.", minimum=0.0)
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm; 0 turns that off.", minimum=0.0)
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd"] = option(
        "adamw_torch", "Optimizer, by transformers' name; these need no further package."
    )
    seed: int = option(0, "Seed of the data order and of dropout.", minimum=0)
    gradient_checkpointing: bool = option(False, "Compute activations again in the backward pass to save memory.")
    log_every: int = option(5, "Steps between two entries in metrics.jsonl.", minimum=1)
    save_every: int | None = option(None, "Steps between two checkpoints; null writes none.", minimum=1)
    keep_checkpoints: int = option(2, "How many checkpoints stay on disk.", minimum=1)
    threads: int | None = option(None, "CPU threads of PyTorch; null leaves its default.", minimum=1)


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    batches: int = option(32, "At most so many batches of training data for a start from data.", minimum=1)
    batch_size: int | None = option(None, "Examples in one of them; null takes training.batch_size.", minimum=1)
    statistics: str | None = option(
        None, "A .safetensors file of statistics, used where it is there, else written."
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    every: int | None = option(None, "Steps between two held-out losses during training; null: none.", minimum=1)
    keep_best: bool = option(False, "End with the adapter of the lowest held-out loss (needs every and save_every).")
    generate: bool = option(True, "Also answer the held-out prompts and count exact matches (greedy decoding).")
    batch_size: int = option(16, "Examples evaluated at once.", minimum=1)
    max_new_tokens: int = option(128, "Longest answer, in tokens.", minimum=1)
    samples: int = option(3, "Answers shown before and after.", minimum=0)
    limit: int | None = option(None, "Use only this many held-out examples.", minimum=1)


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    directory: str = option("runs/veneer", "Where everything is written, relative to the current directory.")
    overwrite: bool = option(False, "Allow a directory that holds an earlier run.")
    report: bool = option(True, "Write report.html.")
    check_reload: bool = option(True, "Load the saved adapter into a fresh model and compare logits bit by bit.")
    check_merge: bool = option(True, "Merge, and compare logits with the unmerged model.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: ModelSettings
    adapter: AdapterSettings
    data: DataSettings
    calibration: CalibrationSettings
    training: TrainingSettings
    evaluation: EvaluationSettings
    output: OutputSettings
    base: Path  # the folder that data paths are relative to
    source: Mapping[str, Any]  # the plain config, as read and overridden


SECTIONS = {
    "data": DataSettings,
    "calibration": CalibrationSettings,
    "training": TrainingSettings,
    "evaluation": EvaluationSettings,
    "output": OutputSettings,
}
_KEYS = ("model", "adapter", *SECTIONS)


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Settings from a YAML file, with `a.b=value` overrides applied. Raises `ConfigError`."""
    path = Path(path)
    config = config_file.read(path)
    for assignment in overrides:
        if isinstance(config.get("model"), str) and assignment.startswith("model."):
            config["model"] = {"name": config["model"]}
        override(config, assignment, config_file.parse_value)
    return parse_settings(config, path.parent)


def parse_settings(config: Mapping[str, Any], base: Path) -> Settings:
    """Settings from plain data; data paths are relative to `base`. Raises `ConfigError`."""
    for key in config:
        if key not in _KEYS:
            raise _unknown_section(str(key))
    for key in ("model", "adapter", "data"):
        if key not in config:
            raise ConfigError(f"the config has no section {key!r}; needed: model, adapter, data")
    sections: dict[str, Any] = {name: build(cls, config.get(name) or {}, name) for name, cls in SECTIONS.items()}
    settings = Settings(
        model=parse_model(config["model"]),
        adapter=parse_adapter(config["adapter"]),
        base=base,
        source=config,
        **sections,
    )
    check_together(settings)
    return settings


def _unknown_section(key: str) -> ConfigError:
    """The error for an unknown top-level key, which may be a key of a section that was not indented."""
    keys = {"model": _names(ModelSettings), "adapter": _adapter_keys()}
    keys |= {name: _names(cls) for name, cls in SECTIONS.items()}
    homes = [section for section, known in keys.items() if key in known]
    if homes:
        return ConfigError(f"{key!r} stands at the top of the config; it belongs into the section {' or '.join(homes)}")
    hint = nearest(key, _KEYS) or "."
    return ConfigError(f"unknown section {key!r} in the config{hint} Sections: {', '.join(_KEYS)}")


def _names(cls: Any) -> set[str]:
    return {field.name for field in fields(cls)}


def _adapter_keys() -> set[str]:
    options: set[str] = set().union(*(_names(method_class(key)) for key in method_names()))
    return {"method", "rules", "targets", "name", "seed"} | options


def parse_model(value: Any) -> ModelSettings:
    """The `model` section; a plain text is its name."""
    model = build(ModelSettings, {"name": value} if isinstance(value, str) else value, "model")
    if not model.name:
        raise ConfigError("model.name is missing: a Hugging Face model, a local folder, or smollm2-135m")
    if model.quantize is not None:
        quantised.check(model.quantize)
    elif model.keep_dense_mb:
        raise ConfigError("model.keep_dense_mb has no effect without model.quantize")
    return model


def parse_adapter(value: Any) -> AdapterSettings:
    """The `adapter` section: either `method` with its options and `targets`, or `rules`. Raises `ConfigError`."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"adapter must be a mapping with 'method' or 'rules', got {value!r}")
    options = dict(value)
    name, seed = options.pop("name", "default"), options.pop("seed", 0)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"adapter.name must be text, got {name!r}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"adapter.seed must be a whole number, got {seed!r}")
    rules = _parse_rules(options) if "rules" in options else _parse_method(options)
    return AdapterSettings(name=name, seed=seed, rules=rules)


def _parse_rules(options: dict[str, Any]) -> dict[str, Method | None]:
    rules = options.pop("rules")
    if options:
        raise ConfigError(f"adapter has 'rules', so {', '.join(map(repr, options))} belongs inside one of its rules")
    if not isinstance(rules, Mapping) or not rules:
        raise ConfigError(f"adapter.rules must map patterns to methods or null, got {rules!r}")
    return {str(pattern): _method(rule, f"adapter.rules[{pattern!r}]") for pattern, rule in rules.items()}


def _parse_method(options: dict[str, Any]) -> dict[str, Method | None] | Method:
    targets = options.pop("targets", None)
    if "method" not in options:
        known = ["method", "rules", "targets", "name", "seed"]
        hint = next((nearest(str(key), known) for key in options if nearest(str(key), known)), "")
        raise ConfigError(f"adapter needs 'method' (one of {', '.join(method_names())}) or 'rules'{hint}")
    method = _method(options, "adapter")
    assert method is not None
    if targets is None:
        return method
    patterns = [targets] if isinstance(targets, str) else targets
    if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise ConfigError(f"adapter.targets must be a pattern or a list of patterns, got {targets!r}")
    return dict.fromkeys(patterns, method)


def _method(value: Any, where: str) -> Method | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = {"method": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a method with its options, or null; got {value!r}")
    try:
        return method_from_dict(value)
    except VeneerError as error:
        raise ConfigError(f"{where}: {error}") from None
