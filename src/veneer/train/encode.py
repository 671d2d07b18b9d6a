"""Examples → token ids with a mask of the tokens that carry loss.

The mask of a chat is found by rendering: the chat up to an answer (with the generation prompt) and the chat through
that answer must both be beginnings of the whole rendered chat, and what lies between them is the answer. That is
right for every template for which it is defined, and an error for the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.train.extras import require
from veneer.train.forms import DataError, Example

IGNORED = -100  # label of a token without loss, as torch.nn.functional.cross_entropy skips it
_GENERATION_MARKER = re.compile(r"{%-?\s*generation\s*-?%}")
Span = tuple[int, int]


class EmptyMaskError(DataError):
    """An example in which no token carries loss."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """`input_ids` and `labels` have one length; a label is the token's own id, or -100 where no loss is taken.

    The first token is predicted from nothing, so it never carries loss.
    """

    place: str
    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns examples into tokens with one tokenizer and one set of choices."""

    tokenizer: Any  # a transformers tokenizer
    train_on: str = "answers"
    max_length: int = 1024
    too_long: str = "truncate"

    def encode_all(self, examples: Sequence[Example]) -> tuple[list[Encoded], int, int]:
        """(encoded, how many were cut, how many were skipped). Raises `DataError` or `EmptyMaskError`."""
        encoded, cut, skipped = [], 0, 0
        for example in examples:
            one = self.encode(example)
            if len(one) > self.max_length:
                if self.too_long == "error":
                    raise DataError(
                        f"{example.place} has {len(one)} tokens, more than data.max_length {self.max_length}; "
                        "raise it, or set data.too_long to truncate or skip"
                    )
                if self.too_long == "skip":
                    skipped += 1
                    continue
                cut += 1
                one = self._truncate(one)
            encoded.append(one)
        if examples and not encoded:
            raise DataError(f"all {skipped} examples are longer than data.max_length {self.max_length}")
        return encoded, cut, skipped

    def encode(self, example: Example) -> Encoded:
        """One example at full length. Raises `EmptyMaskError` if no token would carry loss."""
        if example.is_chat:
            text, spans = self._render(example)
            return self._masked(example.place, *self._tokens(text, spans, special=False))
        text = example.prompt + example.text
        ids, labels = self._tokens(text, [(len(example.prompt), len(text))], special=True)
        return self._masked(example.place, *self._close(ids, labels))

    def encode_spans(self, place: str, text: str, spans: list[Span]) -> Encoded:
        """A text of which the tokens that touch a span of characters carry loss, with the tokenizer's own special
        tokens around it. Raises `EmptyMaskError` if there is none."""
        return self._masked(place, *self._tokens(text, spans, special=True))

    def _masked(self, place: str, ids: list[int], labels: list[int]) -> Encoded:
        if self.train_on == "everything":
            labels = list(ids)
        else:  # nothing after the last answer teaches anything
            last = max((i for i, label in enumerate(labels) if label != IGNORED), default=len(labels) - 1)
            ids, labels = ids[: last + 1], labels[: last + 1]
        one = Encoded(place=place, input_ids=ids, labels=[IGNORED, *labels[1:]])
        self._check_mask(one, one)
        return one

    def prompt_ids(self, example: Example) -> list[int]:
        """The tokens from which the model is to answer: everything before the last answer."""
        if example.is_chat:
            messages = list(example.messages[: last_answer(example)])
            return self._ids(self._apply(messages, example, generation=True), special=False)
        return self._ids(example.prompt, special=True)

    # -- chats ------------------------------------------------------------------------------------------------

    def _render(self, example: Example) -> tuple[str, list[Span]]:
        """The whole chat as text, and the character spans of its answers."""
        messages = list(example.messages)
        whole = self._apply(messages, example)
        if self.train_on == "everything":
            return whole, [(0, len(whole))]
        if _GENERATION_MARKER.search(self.tokenizer.chat_template or ""):
            return whole, self._marked_spans(messages, example, whole)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._apply(messages[:i], example, generation=True)
            through = self._apply(messages[: i + 1], example)
            for part in (before, through):
                _check_beginning(part, whole, example, i)
            spans.append((len(before), self._without_tail(through)))
        return whole, spans

    def _without_tail(self, through: str) -> int:
        """Where the answer ends: templates put a line break after the end token, which is not the model's to say."""
        bare = through.rstrip()
        end = self.tokenizer.eos_token
        return len(bare) if end and bare.endswith(end) else len(through)

    def _marked_spans(self, messages: list[dict[str, str]], example: Example, whole: str) -> list[Span]:
        """Spans of a template that marks its answers itself with {% generation %}."""
        chat = require("transformers.utils.chat_template_utils", "rendering a chat template")
        _, spans = chat.render_jinja_template(
            [messages], chat_template=self.tokenizer.chat_template, return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )  # fmt: skip
        if not spans[0]:
            raise EmptyMaskError(f"{example.place}: the template's generation marker covers nothing in:\n{whole[:600]}")
        return [(int(start), int(end)) for start, end in spans[0]]

    def _apply(self, messages: list[dict[str, str]], example: Example, generation: bool = False) -> str:
        jinja2 = require("jinja2", "rendering a chat template")
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{example.place} is a chat, but the tokenizer has no chat template; give one in data.chat_template, "
                "or use the prompt/completion or text form"
            )
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        except (jinja2.TemplateError, IndexError) as error:
            roles = ", ".join(m["role"] for m in messages)
            raise DataError(f"{example.place}: the chat template refuses the roles [{roles}]: {error}") from None

    # -- tokens -----------------------------------------------------------------------------------------------

    def _ids(self, text: str, special: bool) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        if special and ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()  # some tokenizers end every text, and a prompt is not at its end
        return ids

    def _tokens(self, text: str, spans: list[Span], special: bool) -> tuple[list[int], list[int]]:
        """ids, and labels for the tokens that touch a span."""
        if not self.tokenizer.is_fast:
            return self._tokens_by_prefix(text, spans, special)
        found = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids = list(found["input_ids"])
        labels = [IGNORED] * len(ids)
        for k, (start, end) in enumerate(found["offset_mapping"]):
            if start < end and any(start < stop and end > begin for begin, stop in spans):
                labels[k] = ids[k]
        return ids, labels

    def _tokens_by_prefix(self, text: str, spans: list[Span], special: bool) -> tuple[list[int], list[int]]:
        """For tokenizers without offsets: the tokens of a beginning must be the beginning of the tokens."""
        ids = self._ids(text, special)
        labels = [IGNORED] * len(ids)
        for begin, stop in spans:
            first, last = (self._ids(text[:place], special) for place in (begin, stop))
            for part in (first, last):
                if ids[: len(part)] != part:
                    raise DataError(
                        "this tokenizer gives no character offsets and joins tokens across the border of an answer, "
                        f"so the answer's tokens cannot be told from the prompt's, in:\n{text[:600]}"
                    )
            labels[len(first) : len(last)] = ids[len(first) : len(last)]
        return ids, labels

    def _close(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """A completion or text ends with the end token, so that the model learns to stop."""
        end = self.tokenizer.eos_token_id
        if end is None:
            return ids, labels
        if ids[-1:] == [end]:
            return ids, [*labels[:-1], end]
        return [*ids, end], [*labels, end]

    def _truncate(self, one: Encoded) -> Encoded:
        short = Encoded(
            place=one.place, input_ids=one.input_ids[: self.max_length], labels=one.labels[: self.max_length]
        )
        self._check_mask(short, one)
        return short

    def _check_mask(self, one: Encoded, whole: Encoded) -> None:
        if one.trained_tokens:
            return
        shown = self.tokenizer.decode(whole.input_ids[:200])
        if len(one) < len(whole):
            why = f"after cutting its {len(whole)} tokens to data.max_length {len(one)} no token of the answer is left"
        else:
            why = "its answer has no tokens"
        raise EmptyMaskError(f"{one.place}: the loss mask is empty: {why}. The example:\n{shown}")


def last_answer(example: Example) -> int:
    """The index of the last assistant message of a chat."""
    return max(i for i, m in enumerate(example.messages) if m["role"] == "assistant")


def reference_answer(example: Example) -> str:
    """What the model is expected to answer."""
    return example.messages[last_answer(example)]["content"] if example.is_chat else example.text


def _check_beginning(part: str, whole: str, example: Example, index: int) -> None:
    if whole.startswith(part):
        return
    same = next((k for k, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    raise DataError(
        f"{example.place}: the chat template renders the messages before and through answer {index} otherwise than "
        f"inside the whole chat, so the answer's tokens cannot be told from the rest. They differ from character "
        f"{same}: {part[same : same + 60]!r} instead of {whole[same : same + 60]!r}. Use a template with generation "
        "markers or consistent beginnings (data.chat_template), or data.train_on: everything"
    )


def show_mask(one: Encoded, tokenizer: Any) -> list[tuple[str, bool]]:
    """The example as (text, carries loss) pieces, for display."""
    pieces: list[tuple[list[int], bool]] = []
    for token, label in zip(one.input_ids, one.labels, strict=True):
        trained = label != IGNORED
        if pieces and pieces[-1][1] == trained:
            pieces[-1][0].append(token)
        else:
            pieces.append(([token], trained))
    return [(tokenizer.decode(ids), trained) for ids, trained in pieces]
