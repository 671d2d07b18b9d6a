"""`AutoPeftModel…`: the base model and its adapter in one call, from the adapter's files alone."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from torch import nn

from veneer.method import VeneerError
from veneer.peft import hub, tasks
from veneer.peft.config import PeftConfig
from veneer.peft.model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel, model_class
from veneer.peft.utils.constants import TOKENIZER_CONFIG_NAME

__all__ = ["MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "AutoPeftModel", "AutoPeftModelForCausalLM",
           "AutoPeftModelForFeatureExtraction", "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM",
           "AutoPeftModelForSequenceClassification", "AutoPeftModelForTokenClassification"]

#: libraries of which an adapter's config may name a class to be imported, unless others are allowed
_ALLOWED = ("transformers",)
#: what is for the adapter and not for the base model
_OF_ADAPTER = ("subfolder", "autocast_adapter_dtype", "ephemeral_gpu_offload", "low_cpu_mem_usage", "key_mapping")
#: what is for both, as it says how to reach the Hub
_OF_HUB = ("cache_dir", "token", "local_files_only", "force_download")


class _BaseAutoPeftModel:
    _target_class: ClassVar[str | None] = None
    _target_peft_class: ClassVar[type[PeftModel]] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(f"{type(self).__name__} is designed to be instantiated using the "
                      f"`{type(self).__name__}.from_pretrained(pretrained_model_name_or_path)` method.")

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here, nor in PEFT: a config has no weights."""
        raise OSError(f"{cls.__name__}.from_config: a config alone has neither the base's weights nor the adapter's; "
                      f"use {cls.__name__}.from_pretrained(path), or get_peft_model(base_model, config)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, adapter_name: str = "default",
                        is_trainable: bool = False, config: PeftConfig | None = None, revision: str | None = None,
                        import_allowlist: Sequence[str] | None = None, **kwargs: Any) -> PeftModel:
        """Load the base model that an adapter's config names, by transformers, and the adapter onto it.

        Where a tokenizer lies beside the adapter and has more tokens than the base has embeddings, these are resized
        first. revision: of the adapter; that of the base stands in the config. import_allowlist: libraries of which
        the config may name the base's class, where it names no task; by default transformers alone.
        kwargs: for the base's `from_pretrained` (dtype, device_map, …); subfolder and other arguments of
        `PeftModel.from_pretrained` are for the adapter, those about the Hub for both.

        Raises `ValueError` where config and class are for different tasks, and for a library that is not allowed.
        """
        of_hub = {key: kwargs[key] for key in _OF_HUB if key in kwargs}
        of_adapter = {key: kwargs.pop(key) for key in _OF_ADAPTER if key in kwargs} | of_hub
        where = {key: of_adapter[key] for key in ("subfolder", *_OF_HUB) if key in of_adapter}
        found = PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **where)
        target = cls._base_class(found, tuple(_ALLOWED if import_allowlist is None else import_allowlist))
        base = target.from_pretrained(found.base_model_name_or_path, revision=found.revision, **kwargs)
        if hub.has_file(pretrained_model_name_or_path, TOKENIZER_CONFIG_NAME, revision=revision, **where):
            _resize(base, pretrained_model_name_or_path, revision=revision,
                    trust_remote_code=kwargs.get("trust_remote_code", False), **where)
        return cls._target_peft_class.from_pretrained(base, pretrained_model_name_or_path, adapter_name, is_trainable,
                                                      config, revision=revision, **of_adapter)

    @classmethod
    def _base_class(cls, config: PeftConfig, allowed: tuple[str, ...]) -> Any:
        if config.base_model_name_or_path is None:
            raise VeneerError(f"{cls.__name__}: the adapter's config does not name its base model "
                              "(base_model_name_or_path); load that yourself, and use PeftModel.from_pretrained")
        if config.task_type is not None:
            wanted = model_class(config.task_type)
            if cls._target_class is None:
                raise ValueError("Cannot use `AutoPeftModel` with a task type, please use a specific class for your "
                                 f"task type: Auto{wanted.__name__}")
            if cls._target_peft_class is not wanted:
                raise ValueError(f"Expected target PEFT class: {wanted.__name__}, but you have asked for: "
                                 f"{cls._target_peft_class.__name__}. The adapter's task_type is "
                                 f"{config.task_type!r}; use Auto{wanted.__name__}")
            return getattr(importlib.import_module("transformers"), cls._target_class)
        if config.auto_mapping is None:
            raise ValueError("Cannot infer the auto class from the config, which has neither task_type nor "
                             "auto_mapping; load the base model yourself, and use PeftModel.from_pretrained")
        library, name = config.auto_mapping["parent_library"], config.auto_mapping["base_model_class"]
        if library not in allowed and not any(library.startswith(f"{each}.") for each in allowed):
            raise ValueError(f"The auto mapping wants to import {library!r}, which is not in the import allowlist "
                             f"({', '.join(allowed)}). If you are sure that importing this library is safe, specify "
                             f"`import_allowlist=[{library!r}]` in `from_pretrained()`.")
        return getattr(importlib.import_module(library), name)


def _resize(base: nn.Module, path: str | Path, *, subfolder: str | None = None, **options: Any) -> None:
    """Give the base as many embeddings as the tokenizer beside the adapter has tokens, if it has fewer."""
    ask = getattr(base, "get_input_embeddings", None)
    if not callable(ask):
        return
    options |= {} if subfolder is None else {"subfolder": subfolder}
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(path, **options)
    if len(tokenizer) > ask().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))  # type: ignore[operator]


class AutoPeftModel(_BaseAutoPeftModel):
    """For adapters without a task, whose config names the class of the base."""


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    """For language models."""

    _target_class = "AutoModelForCausalLM"
    _target_peft_class = tasks.PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    """For encoder-decoder models."""

    _target_class = "AutoModelForSeq2SeqLM"
    _target_peft_class = tasks.PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    """For models that classify texts."""

    _target_class = "AutoModelForSequenceClassification"
    _target_peft_class = tasks.PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    """For models that classify tokens."""

    _target_class = "AutoModelForTokenClassification"
    _target_peft_class = tasks.PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    """For models that find answers in a text."""

    _target_class = "AutoModelForQuestionAnswering"
    _target_peft_class = tasks.PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    """For models whose hidden states are wanted."""

    _target_class = "AutoModel"
    _target_peft_class = tasks.PeftModelForFeatureExtraction
