"""Datasets of conversations for transformers' Trainer, and the batches that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from veneer.fastchat.conversation import SHOWN, Conversation
from veneer.train.encode import IGNORED, Encoded

Item = dict[str, list[int]]
Encode = Callable[[Conversation], Encoded | None]


def encode_all(conversations: Sequence[Conversation], encode: Encode) -> tuple[list[Item], list[str]]:
    """(items, names of the conversations of which nothing to train on is left after the cut)."""
    items, empty = [], []
    for conversation in conversations:
        one = encode(conversation)
        if one is None:
            empty.append(conversation.label)
        else:
            items.append(_item(one))
    return items, empty


class LazyConversations(Dataset):
    """Makes tokens of a conversation when it is first asked for, and keeps them.

    A conversation of which nothing to train on is left after the cut stays in its place without a label, and its name
    goes to `tell`, once.
    """

    def __init__(self, conversations: Sequence[Conversation], encode: Encode, pad_id: int,
                 tell: Callable[[str], None]) -> None:
        self.conversations = conversations
        self.encode = encode
        self.pad_id = pad_id
        self.tell = tell
        self.cached: dict[int, Item] = {}

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Item:
        if index not in self.cached:
            one = self.encode(self.conversations[index])
            if one is None:
                self.tell(self.conversations[index].label)
            self.cached[index] = _item(one) if one is not None else _nothing(self.pad_id)
        return self.cached[index]


    def first_trained(self) -> int | None:
        """The place of the first conversation that teaches anything; None where all are cut away. Those before it are
        not kept, so that they are told of when training meets them."""
        for index, conversation in enumerate(self.conversations):
            one = self.encode(conversation)
            if one is not None:
                self.cached[index] = _item(one)
                return index
        return None


def _item(one: Encoded) -> Item:
    return {"input_ids": one.input_ids, "attention_mask": [1] * len(one), "labels": one.labels}


def _nothing(pad_id: int) -> Item:
    return {"input_ids": [pad_id], "attention_mask": [1], "labels": [IGNORED]}


class ConversationCollator:
    """Pads items to the longest of their batch: (batch, longest) `input_ids`, `attention_mask`, `labels`."""

    def __init__(self, pad_id: int, side: str = "right") -> None:
        self.fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}
        self.side = side

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        longest = max(len(item["input_ids"]) for item in items)
        return {name: torch.tensor([self._padded(item[name], longest, value) for item in items])
                for name, value in self.fill.items()}

    def _padded(self, row: list[int], length: int, value: int) -> list[int]:
        rest = [value] * (length - len(row))
        return [*rest, *row] if self.side == "left" else [*row, *rest]


def cut_away(labels: Sequence[str], length: int, path: str) -> str:
    """Names conversations whose answers lie beyond the cut."""
    more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    return (f"{len(labels)} conversations in {path!r} have no token of an answer within --model_max_length {length} "
            f"and are left out: {', '.join(labels[:SHOWN])}{more}")
