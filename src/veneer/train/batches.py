"""Batches of examples of like length, and their padding."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from veneer.train.encode import IGNORED, EmptyMaskError, Encoded

_POOL = 16  # batches sorted together: enough to save padding, few enough to leave the order random


class LengthGroupedSampler(Sampler[int]):
    """Indices in which every `batch` consecutive ones have like lengths, in an order fixed by (seed, epoch).

    The order depends on nothing else, so a resumed run sees the batches that the interrupted one would have seen.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch = batch
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}-{self.epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        pool = self.batch * _POOL
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            part = sorted(order[start : start + pool], key=lambda i: self.lengths[i])
            batches += [part[k : k + self.batch] for k in range(0, len(part), self.batch)]
        short = [b for b in batches if len(b) < self.batch]  # at most one, and it must come last to stay one batch
        full = [b for b in batches if len(b) == self.batch]
        rng.shuffle(full)
        return (i for b in full + short for i in b)


class Collator:
    """Pads encoded examples on the right to (batch, longest) tensors `input_ids`, `attention_mask`, `labels`."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        for one in batch:
            if not one.trained_tokens:
                raise EmptyMaskError(f"{one.place}: the loss mask is empty; its tokens: {one.input_ids[:50]}")
        return {
            "input_ids": _pad([e.input_ids for e in batch], self.pad_id),
            "attention_mask": _pad([[1] * len(e) for e in batch], 0),
            "labels": _pad([e.labels for e in batch], IGNORED),
        }


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """(batch, longest) `input_ids` and `attention_mask` for generation, which continues on the right."""
    longest = max(len(row) for row in rows)
    ids: list[list[Any]] = [[*[pad_id] * (longest - len(row)), *row] for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def by_length(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Index batches for evaluation, longest first: what does not fit into memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[k : k + batch] for k in range(0, len(order), batch)]
