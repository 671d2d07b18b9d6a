"""transformers' Trainer for a model adapted in place: it saves, resumes and restores one adapter, never the base."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import accelerate
import torch
import transformers
from torch import Tensor, nn

import veneer
from veneer.attached import attached
from veneer.io.save import SaveReport
from veneer.method import VeneerError
from veneer.train.checkpoint import load_progress, save_progress

LAST_GOOD = "last_good"


class DivergedError(VeneerError):
    """The loss or a gradient is NaN or infinite; the message names the step and where the last good adapter is."""


class AdapterCheckpoints(transformers.Trainer):
    """A Trainer whose checkpoints hold the adapter `adapter_name`, and which stops at a loss that is not finite."""

    adapter_name = "default"
    #: what the user can change when training diverges
    remedies: ClassVar[str] = "a lower learning rate"

    # -- checkpoints --------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; no process gathers the base for that."""
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        path = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            path.mkdir(parents=True, exist_ok=True)
            self.save_adapter(path)
        elif self.is_fsdp_enabled:  # sharded tensors are gathered, for which every process must ask
            with tempfile.TemporaryDirectory() as unused:
                self.save_adapter(Path(unused))

    def save_adapter(self, path: Path) -> SaveReport:
        """Write the adapter into `path`, and what it needs beside its numbers to go on."""
        model = self.accelerator.unwrap_model(self.model)
        report = veneer.save(model, path, name=self.adapter_name)
        save_progress(model, self.adapter_name, path)
        return report

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # transformers would write the whole base beside it, into every checkpoint
        plugin = self.accelerator.state.fsdp_plugin
        accelerate.utils.save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / transformers.trainer.SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is None:
            raise VeneerError("there is no best checkpoint to go back to")
        self._restore(self.state.best_model_checkpoint)

    def _restore(self, path: str) -> None:
        """Fill the adapter from a checkpoint; its parameters stay the same objects, which the optimizer may hold."""
        model = self.accelerator.unwrap_model(self.model)
        if not os.path.isdir(path):
            raise VeneerError(f"there is no checkpoint at {path!r}")
        veneer.load(model, path, name=self.adapter_name)
        load_progress(model, self.adapter_name, Path(path))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """transformers asks whether it is at the end after a step only, and would take one more than there are."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # -- what is not finite -------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            self.diverged(f"the loss is {float(loss)}")
        return loss

    def diverged(self, what: str) -> None:
        """Stop, before the step is taken, and keep the adapter as it was. Raises `DivergedError`."""
        model = self.accelerator.unwrap_model(self.model)
        kept = "its parameters are not finite either, so it was not saved"
        if all(torch.isfinite(p).all() for p in own_parameters(model, self.adapter_name)):
            path = Path(self.args.output_dir) / LAST_GOOD
            self._save(str(path))
            kept = f"the adapter as it was before this step is in {str(path)!r}"
        last = transformers.trainer_utils.get_last_checkpoint(self.args.output_dir)
        checkpoint = f"; the last checkpoint is {last!r}" if last else ""
        rate = self.lr_scheduler.get_last_lr()[0] if self.lr_scheduler is not None else self.args.learning_rate
        raise DivergedError(
            f"training stopped in step {self.state.global_step + 1} of {self.state.max_steps}: {what} at learning "
            f"rate {rate:.3g}. The step was not taken: {kept}{checkpoint}. Usual remedies: {self.remedies}"
        )


def own_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of the adapter `name`."""
    return [p for item in attached(model, name) for p in item.adapter.parameters()]


class GradientGuard(transformers.TrainerCallback):
    """A finite loss can have gradients that are not; the optimizer must not see them."""

    def __init__(self, trainer: AdapterCheckpoints) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        if self.trainer.accelerator.scaler is not None or not gradients:
            return  # a loss scaler meets infinities by design and skips those steps itself
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            self.trainer.diverged("the loss is finite but its gradient is not,")
