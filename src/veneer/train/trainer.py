"""transformers' Trainer for a model adapted in place: it saves, resumes and restores adapters, never the base."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import veneer
from veneer.attached import attached
from veneer.method import VeneerError
from veneer.train.batches import Collator, LengthGroupedSampler
from veneer.train.checkpoint import load_progress, save_progress
from veneer.train.encode import Encoded
from veneer.train.evaluate import heldout_loss
from veneer.train.loss import keeps_logits, masked_loss
from veneer.train.settings import EvaluationSettings, TrainingSettings

LAST_GOOD = "last_good"
_RECENT = 9  # steps whose median is the present speed


class DivergedError(VeneerError):
    """The loss or a gradient is NaN or infinite; the message names the step and where the last good adapter is."""


def total_steps(training: TrainingSettings, examples: int, world: int = 1) -> int:
    """Optimizer steps of the whole run."""
    if training.max_steps is not None:
        return training.max_steps
    batches = math.ceil(examples / (training.batch_size * world))
    return max(1, math.ceil(training.epochs * math.ceil(batches / training.gradient_accumulation)))


def training_arguments(
    training: TrainingSettings, evaluation: EvaluationSettings, directory: Path, steps: int
) -> transformers.TrainingArguments:
    """Our settings as transformers' arguments. Nothing is logged elsewhere and nothing is downloaded.
    """
    known = {f.name for f in fields(transformers.TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=training.epochs,
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=evaluation.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=round(training.warmup_ratio * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optimizer,
        seed=training.seed,
        data_seed=training.seed,
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,  # a NaN is an error here, not something to average away
        save_strategy="steps" if training.save_every else "no",
        save_steps=training.save_every or 500,
        save_total_limit=training.keep_checkpoints,
        eval_strategy="steps" if evaluation.every else "no",
        eval_steps=evaluation.every,
        load_best_model_at_end=evaluation.keep_best,
        metric_for_best_model="eval_loss" if evaluation.keep_best else None,
        greater_is_better=False if evaluation.keep_best else None,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),  # said aloud: else several CPU processes train side by side
        **{checkpointing: training.gradient_checkpointing},
    )
    # one process drives one device: replicas made by DataParallel would not share the adapters' route. Several GPUs
    # are used through torchrun
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class AdapterTrainer(transformers.Trainer):
    """Trains the adapter `adapter_name` of `model`, which stays adapted in place throughout."""

    def __init__(
        self,
        model: nn.Module,
        arguments: transformers.TrainingArguments,
        train: Sequence[Encoded],
        heldout: Sequence[Encoded],
        pad_id: int,
        adapter_name: str = "default",
        callbacks: Sequence[transformers.TrainerCallback] = (),
    ) -> None:
        self.adapter_name = adapter_name
        self.pad_id = pad_id
        self.tokens_seen = 0  # of this process, padding not counted
        super().__init__(
            model=model,
            args=arguments,
            data_collator=Collator(pad_id),
            train_dataset=train,
            eval_dataset=heldout or None,
            callbacks=[*callbacks, _GradientGuard(self)],
        )
        self.remove_callback(transformers.PrinterCallback)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of the whole accumulated batch
        self.keeps_logits = keeps_logits(model)

    # -- loss ---------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        total, count, outputs = masked_loss(model, inputs, self.keeps_logits)
        if num_items_in_batch is None:
            loss = total / count
        else:  # gradients are averaged over processes, so a sum over all tokens needs their number back
            scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = total * scale / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.tokens_seen += int(inputs["attention_mask"].sum())
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            self.diverged(f"the loss is {float(loss)}")
        return loss

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Mean held-out loss per token, over all processes."""
        share = (self.accelerator.process_index, self.accelerator.num_processes)
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.accelerator.unwrap_model(self.model)
        loss, tokens = heldout_loss(model, data, self.pad_id, self.args.per_device_eval_batch_size, share=share)
        sums = torch.tensor([loss, tokens], dtype=torch.float64 if self.args.device.type != "mps" else torch.float32)
        sums = self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
        metrics = {f"{metric_key_prefix}_loss": float(sums[0] / sums[1])}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- data ---------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        data = self.train_dataset if train_dataset is None else train_dataset
        block = self.args.per_device_train_batch_size * self.accelerator.num_processes
        return LengthGroupedSampler([len(e) for e in data], block, self.args.data_seed)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            path = Path(output_dir or self.args.output_dir)
            path.mkdir(parents=True, exist_ok=True)
            model = self.accelerator.unwrap_model(self.model)
            veneer.save(model, path, name=self.adapter_name)
            save_progress(model, self.adapter_name, path)

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
            f"rate {rate:.3g}. The step was not taken: {kept}{checkpoint}. Usual remedies: a lower "
            "training.learning_rate, more training.warmup_ratio, model.dtype float32 instead of float16"
        )


def own_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of the adapter `name`."""
    return [p for item in attached(model, name) for p in item.adapter.parameters()]


class _GradientGuard(transformers.TrainerCallback):
    """A finite loss can have gradients that are not; the optimizer must not see them."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        if self.trainer.accelerator.scaler is not None or not gradients:
            return  # a loss scaler meets infinities by design and skips those steps itself
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            self.trainer.diverged("the loss is finite but its gradient is not,")


class TimeLimit(transformers.TrainerCallback):
    """Ends training after so many minutes, at the same step in every process.

    Where the steps left would take longer than the time left, the schedule takes larger strides, so that the learning
    rate has come down when time is up. The very first step is no measure of the others (it warms up and compiles). A
    run that is fast enough is not touched.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = minutes * 60
        self.reached = False
        self._start = self._begun = self._ended = 0.0
        self._steps: list[float] = []  # seconds of each step after the first
        self._between: list[float] = []  # seconds from a step to the next: data, evaluation, saving

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.monotonic()
        self._ended = 0.0
        self._steps, self._between = [], []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.monotonic()
        if self._ended:
            self._between.append(self._begun - self._ended)

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        now = time.monotonic()
        if self._ended:
            self._steps.append(now - self._begun)
        self._ended = now
        # the slowest process decides, for all of them alike
        clock = torch.tensor([now - self._start, self._step_time()], dtype=torch.float32, device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(clock, torch.distributed.ReduceOp.MAX)
        spent, each = clock.tolist()
        if state.global_step >= state.max_steps:
            return
        if spent > self.seconds:
            self.reached = True
            control.should_training_stop = True
        elif lr_scheduler is not None and spent + (state.max_steps - state.global_step) * each > self.seconds:
            _stride(lr_scheduler, state.max_steps, max(1, int((self.seconds - spent) / each)))
        if lr_scheduler is not None and state.global_step < lr_scheduler.last_epoch == state.max_steps - 1:
            # the trainer's own step after the next one must not pass the end, where a cosine climbs again
            lr_scheduler.last_epoch -= 1

    def _step_time(self) -> float:
        """Seconds that a step takes now, with its share of what happens between steps; 0 while unknown."""
        if not self._steps:
            return 0.0
        return statistics.median(self._steps[-_RECENT:]) + sum(self._between) / len(self._between)


def _stride(scheduler: Any, end: int, steps: int) -> None:
    """Step ahead, so that `steps` equal strides from here, the trainer's own step included, reach `end`."""
    left = end - scheduler.last_epoch
    for _ in range(min(math.ceil((left - steps) / steps), left - 1)):
        scheduler.step()
