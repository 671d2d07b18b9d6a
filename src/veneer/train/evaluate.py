"""Held-out loss, and exact-match accuracy of greedy answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from veneer.train.batches import Collator, by_length, pad_left
from veneer.train.encode import Encoded, Encoder, reference_answer
from veneer.train.forms import Example
from veneer.train.loss import keeps_logits, masked_loss

Progress = Callable[[int], None]  # called with how many examples were just done


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One held-out prompt with the model's answer."""

    prompt: str
    answer: str
    reference: str

    @property
    def correct(self) -> bool:
        return same_answer(self.answer, self.reference)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    loss: float  # mean over tokens, in nats
    answers: list[Answer]  # in the order of the examples; empty where nothing was generated

    @property
    def correct(self) -> int:
        return sum(answer.correct for answer in self.answers)

    @property
    def accuracy(self) -> float | None:
        return self.correct / len(self.answers) if self.answers else None


def same_answer(answer: str, reference: str) -> bool:
    """Equal as JSON values where the reference is JSON, else equal as text without surrounding space."""
    try:
        expected = json.loads(reference)
    except ValueError:
        return answer.strip() == reference.strip()
    try:
        return _typed(json.loads(answer)) == _typed(expected)
    except ValueError:
        return False


def _typed(value: Any) -> Any:
    """Python holds True == 1 == 1.0; in JSON true is not 1."""
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    return (isinstance(value, bool), value)


def heldout_loss(
    model: nn.Module,
    encoded: Sequence[Encoded],
    pad_id: int,
    batch_size: int,
    progress: Progress | None = None,
    share: tuple[int, int] = (0, 1),
) -> tuple[float, int]:
    """(summed loss in nats, number of tokens). `share` = (rank, world) takes only this rank's batches."""
    collate, keep = Collator(pad_id), keeps_logits(model)
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    training = model.training
    model.eval()
    with torch.inference_mode():
        for indices in by_length([len(e) for e in encoded], batch_size)[share[0] :: share[1]]:
            batch = {k: v.to(device) for k, v in collate([encoded[i] for i in indices]).items()}
            loss, count, _ = masked_loss(model, batch, keep)
            total, tokens = total + float(loss), tokens + count
            if progress:
                progress(len(indices))
    model.train(training)
    return total, tokens


def generate_answers(
    model: Any,
    examples: Sequence[Example],
    encoder: Encoder,
    batch_size: int,
    max_new_tokens: int,
    progress: Progress | None = None,
) -> list[Answer]:
    """Greedy answers to the prompts of the examples, in their order."""
    tokenizer = encoder.tokenizer
    prompts = [encoder.prompt_ids(example) for example in examples]
    device = next(model.parameters()).device
    texts = [""] * len(examples)
    training = model.training
    model.eval()
    with torch.inference_mode():
        for indices in by_length([len(p) for p in prompts], batch_size):
            batch = pad_left([prompts[i] for i in indices], tokenizer.pad_token_id)
            batch = {k: v.to(device) for k, v in batch.items()}
            out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
            new = out[:, batch["input_ids"].shape[1] :]
            for i, row in zip(indices, new, strict=True):
                texts[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
            if progress:
                progress(len(indices))
    model.train(training)
    return [
        Answer(prompt=shown_prompt(example), answer=text, reference=reference_answer(example))
        for example, text in zip(examples, texts, strict=True)
    ]


def shown_prompt(example: Example) -> str:
    """What a person would call the question: the last user message, or the prompt."""
    if not example.is_chat:
        return example.prompt
    return next((m["content"] for m in reversed(example.messages) if m["role"] == "user"), "")


def evaluate(
    model: Any,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    encoder: Encoder,
    settings: Any,
    progress: Progress | None = None,
) -> Evaluation:
    """Loss over `encoded` and, when the settings ask for it, answers to `examples` (plain texts are not asked)."""
    total, tokens = heldout_loss(model, encoded, encoder.tokenizer.pad_token_id, settings.batch_size, progress)
    answers: list[Answer] = []
    asked = [e for e in examples if e.is_chat or e.prompt]
    if settings.generate and asked:
        answers = generate_answers(model, asked, encoder, settings.batch_size, settings.max_new_tokens, progress)
    return Evaluation(loss=total / max(tokens, 1), answers=answers)
