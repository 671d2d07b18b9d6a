"""What no single key of the config shows: settings that do not go together, or have no effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from veneer.method import Method
from veneer.train.schema import ConfigError

if TYPE_CHECKING:
    from veneer.train.settings import Settings


def needing_statistics(rules: Mapping[str, Method | None] | Method) -> list[Method]:
    """The methods that start from data."""
    methods = [rules] if isinstance(rules, Method) else rules.values()
    return list(dict.fromkeys(method for method in methods if method is not None and method.needs is not None))


def _check_starts(settings: Settings) -> None:
    rules = settings.adapter.rules
    methods = [rules] if isinstance(rules, Method) else [method for method in rules.values() if method is not None]
    moving = next((method for method in methods if method.moves_base), None)
    if moving is not None and settings.model.quantize is not None:
        raise ConfigError(f"the start of {moving} rewrites base weights, which model.quantize would have quantised "
                          "before: drop model.quantize (a start for quantised weights, loftq say, quantises those it "
                          "lies on itself), or take another start")
    if "calibration" in settings.source and not needing_statistics(rules):
        raise ConfigError("calibration has no effect: nothing in adapter starts from data (init: eva, corda or "
                          "lora_ga)")
    file = settings.calibration.statistics
    if file is not None and not file.endswith(".safetensors"):
        raise ConfigError(f"calibration.statistics is the name of one file that ends in .safetensors, got {file!r}")


def check_together(settings: Settings) -> None:
    """What no single key shows."""
    _check_starts(settings)
    data, training, evaluation = settings.data, settings.training, settings.evaluation
    if (data.train is None) == (data.generator is None):
        raise ConfigError("data needs exactly one of 'train' (files) and 'generator' (a Python file)")
    if data.heldout is not None and data.heldout_share:
        raise ConfigError("data.heldout and data.heldout_share exclude each other: one gives the held-out examples")
    if data.generator is not None and (data.heldout is not None or data.heldout_share):
        raise ConfigError("data.generator brings its own held-out examples; drop data.heldout and data.heldout_share")
    if data.generator_options and data.generator is None:
        raise ConfigError("data.generator_options has no effect without data.generator")
    if evaluation.keep_best:
        if not evaluation.every or not training.save_every:
            raise ConfigError("evaluation.keep_best needs evaluation.every and training.save_every")
        if training.save_every % evaluation.every:
            raise ConfigError(
                f"evaluation.keep_best: training.save_every ({training.save_every}) must be a multiple of "
                f"evaluation.every ({evaluation.every}), so that every checkpoint has a held-out loss"
            )
    has_heldout = data.heldout is not None or data.heldout_share > 0 or data.generator is not None
    if evaluation.every and not has_heldout:
        raise ConfigError("evaluation.every needs held-out data: data.heldout, data.heldout_share or data.generator")
    if training.epochs == 0 and training.max_steps is None:
        raise ConfigError("training.epochs is 0 and training.max_steps is not set: nothing would be trained")
