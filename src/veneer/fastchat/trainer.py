"""transformers' Trainer as FastChat uses it, for an adapter in place: all of its arguments hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from veneer.train.adapter_checkpoints import AdapterCheckpoints, GradientGuard
from veneer.train.adapter_files import write_record
from veneer.train.encode import IGNORED


class ConversationTrainer(AdapterCheckpoints):
    """Loss, order of the data and schedule are the Trainer's own; checkpoints hold the adapter and the tokenizer."""

    remedies = "a lower --learning_rate, more warmup, --bf16 True or neither instead of --fp16 True"

    def __init__(self, model: nn.Module, arguments: transformers.TrainingArguments, *, record: Mapping[str, Any],
                 **options: Any) -> None:
        """record: what is written beside every adapter that is saved, for those who use it."""
        self.record = record
        super().__init__(model=model, args=arguments, **options)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # there gradients are spread over processes
            self.add_callback(GradientGuard(self))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if not bool((inputs["labels"][:, 1:] != IGNORED).any()):  # all answers cut away, which would be 0/0
            return self._no_loss(model, inputs, *args, **kwargs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _no_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"})
        loss = outputs["logits"].float().sum() * 0.0
        return (loss, outputs) if return_outputs else loss

    def save_adapter(self, path: Path) -> Any:
        report = super().save_adapter(path)
        write_record(path, self.record)
        if path.resolve() != Path(self.args.output_dir).resolve() and isinstance(self.processing_class,
                                                                                 transformers.PreTrainedTokenizerBase):
            self.processing_class.save_pretrained(path)
        return report


def compute_dtype(arguments: transformers.TrainingArguments) -> torch.dtype:
    """In which products are computed."""
    return torch.float16 if arguments.fp16 else torch.bfloat16 if arguments.bf16 else torch.float32
