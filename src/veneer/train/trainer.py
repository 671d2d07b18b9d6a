"""The training command's Trainer: settings as its arguments, the loss over the mask, batches of like length."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from veneer.train.adapter_checkpoints import AdapterCheckpoints, GradientGuard
from veneer.train.batches import Collator, LengthGroupedSampler
from veneer.train.encode import Encoded
from veneer.train.evaluate import heldout_loss
from veneer.train.loss import keeps_logits, masked_loss
from veneer.train.settings import EvaluationSettings, TrainingSettings

_RECENT = 9  # steps whose median is the present speed


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


class AdapterTrainer(AdapterCheckpoints):
    """Trains the adapter `adapter_name` of `model`, which stays adapted in place throughout."""

    remedies = "a lower training.learning_rate, more training.warmup_ratio, model.dtype float32 instead of float16"

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
            callbacks=[*callbacks, GradientGuard(self)],
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
        return super().training_step(model, inputs, *args, **kwargs)

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
