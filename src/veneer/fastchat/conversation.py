"""Conversations in ShareGPT's form: reading, what is wrong with one, and the text that is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.method import nearest
from veneer.train.data import read_rows
from veneer.train.encode import Encoded, Encoder, Span
from veneer.train.forms import DataError, Example, RowError

# FastChat's template vicuna_v1.1: the system message, then "USER: … ASSISTANT: …</s>" for every turn
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions.")
USER, ASSISTANT, END = "USER", "ASSISTANT", "</s>"
_ROLES = {"human": "user", "gpt": "assistant"}
SHOWN = 10  # how many conversations a message names


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One conversation: `label` names it to the user, `turns` are its requests and answers."""

    label: str
    turns: tuple[tuple[str, str], ...]
    system: str | None = None  # its own, which only a model's chat template has a place for


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A conversation that cannot be used, and why."""

    label: str
    reason: str

    def __str__(self) -> str:
        return f"{self.label}: {self.reason}"


def read_conversations(path: str, template: str, end: str) -> tuple[list[Conversation], list[Problem]]:
    """The conversations of a file, and those that cannot be used. Raises `DataError` for a file without any.

    template: "vicuna" or "model"; end: the text that ends an answer in the Vicuna template.
    """
    good: list[Conversation] = []
    bad: list[Problem] = []
    for place, row in read_rows(path, Path()):
        label = _label(row, place)
        try:
            good.append(_conversation(row, label, template, end))
        except RowError as error:
            bad.append(Problem(label=label, reason=str(error)))
    return good, bad


def _label(row: Any, place: str) -> str:
    name = row.get("id") if isinstance(row, Mapping) else None
    return place if name is None else f"id {name!r} ({place})"


def _conversation(row: Any, label: str, template: str, end: str) -> Conversation:
    """Raises `RowError`."""
    if isinstance(row, RowError):
        raise row
    messages = _messages(row)
    system = None
    if messages and messages[0][0] == "system":
        if template == "vicuna":
            raise RowError("message 1 is from 'system', and the Vicuna template has a system message of its own "
                           "(--conversation_template model takes the conversation's)")
        system, messages = messages[0][1], messages[1:]
    if messages and messages[0][0] == "gpt":  # as in FastChat, a greeting that nobody asked for is left out
        messages = messages[1:]
    turns = _turns(messages)
    if template == "vicuna":
        _check_markers(turns, end)
    return Conversation(label=label, turns=turns, system=system)


def _messages(row: Any) -> list[tuple[str, str]]:
    """(from, value) of every message."""
    if not isinstance(row, Mapping):
        raise RowError(f"it is a {type(row).__name__}, not an object with 'conversations'")
    if "conversations" not in row:
        known = ", ".join(map(repr, row)) or "none"
        raise RowError(f"it has no 'conversations'; its fields: {known}")
    messages = row["conversations"]
    if not isinstance(messages, list) or not messages:
        raise RowError("it has no messages")
    return [_message(message, i) for i, message in enumerate(messages, 1)]


def _message(message: Any, number: int) -> tuple[str, str]:
    if not isinstance(message, Mapping) or not isinstance(message.get("value"), str):
        raise RowError(f"message {number} is no {{'from': …, 'value': text}}")
    role = message.get("from")
    if role not in (*_ROLES, "system") or (role == "system" and number > 1):
        hint = nearest(str(role), _ROLES)
        raise RowError(f"message {number} is from {role!r}; possible: human, gpt{hint}")
    return str(role), message["value"]


def _turns(messages: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Request and answer in turn, none of them empty."""
    for number, (role, value) in enumerate(messages):
        expected = ("human", "gpt")[number % 2]
        if role != expected:
            raise RowError(f"{expected!r} and {role!r} do not take turns: a message from {role!r} stands where one "
                           f"from {expected!r} belongs ({_short(value)})")
        if not value:
            raise RowError(f"a message from {role!r} is empty")
    if len(messages) % 2:
        raise RowError(f"its last message is from 'human' and has no answer ({_short(messages[-1][1])})")
    if not messages:
        raise RowError("it has no request with an answer")
    texts = [value for _, value in messages]
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _check_markers(turns: Sequence[tuple[str, str]], end: str) -> None:
    """Texts that hold what the template marks answers with: nothing that reads the whole could tell where one ends."""
    marker = f" {ASSISTANT}: "
    for request, answer in turns:
        if f"{USER}: {request}{marker}{answer}".count(marker) > 1:
            raise RowError(f"a message has {marker.strip()!r} in it, by which the Vicuna template marks answers")
        if end in request or end in answer:
            raise RowError(f"a message has {end!r} in it, by which the Vicuna template ends answers")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def report(problems: Sequence[Problem], total: int, path: str) -> str:
    """The problems of a file in one message: their number, and the first of them by their ids."""
    shown = [str(problem) for problem in problems[:SHOWN]]
    more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n  ".join([f"{len(problems)} of {total} conversations in {path!r} cannot be used:", *shown, *more])


def vicuna_text(turns: Sequence[tuple[str, str]], end: str = END, system: str = SYSTEM) -> tuple[str, list[Span]]:
    """The conversation in the Vicuna template, and the character spans that are trained on: from the space before an
    answer, which a model that was asked has to say too, to its end marker."""
    text = system + " "
    spans = []
    for request, answer in turns:
        text += f"{USER}: {request} {ASSISTANT}:"
        begin = len(text)
        text += f" {answer}{end}"
        spans.append((begin, len(text)))
    return text, spans


def vicuna_prompt(messages: Sequence[Mapping[str, str]], end: str = END, system: str | None = None) -> str:
    """What a model is asked with in the Vicuna template: `messages` from user and assistant in turn, the last one from
    the user. system: instead of the template's own message."""
    texts = [message["content"] for message in messages]
    turns = list(zip(texts[:-1:2], texts[1::2], strict=True))
    text, _ = vicuna_text(turns, end, SYSTEM if system is None else system)
    return f"{text}{USER}: {texts[-1]} {ASSISTANT}:"


def end_marker(tokenizer: Any) -> str:
    """What ends an answer: "</s>" for Vicuna's own tokenizer, and for others the end token, at which they stop."""
    return tokenizer.eos_token or END


@dataclass(frozen=True, kw_only=True)
class ConversationEncoder:
    """Turns conversations into tokens, cut to `max_length`, with labels on what is trained."""

    encoder: Encoder
    template: str

    def __call__(self, conversation: Conversation) -> Encoded | None:
        """None where nothing that is trained is left after the cut. Raises `DataError` for a conversation that the
        model's chat template refuses."""
        one = self._whole(conversation)
        length = self.encoder.max_length
        short = Encoded(place=one.place, input_ids=one.input_ids[:length], labels=one.labels[:length])
        return short if short.trained_tokens else None

    def _whole(self, conversation: Conversation) -> Encoded:
        if self.template == "vicuna":
            text, spans = vicuna_text(conversation.turns, end_marker(self.encoder.tokenizer))
            return self.encoder.encode_spans(conversation.label, text, spans)
        messages = [{"role": "system", "content": conversation.system}] if conversation.system is not None else []
        for request, answer in conversation.turns:
            messages += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        return self.encoder.encode(Example(place=conversation.label, form="sharegpt", messages=tuple(messages)))


def check_template(tokenizer: Any, template: str) -> None:
    """Raises `DataError` where the model has no template of its own."""
    if template == "model" and not tokenizer.chat_template:
        raise DataError("--conversation_template model: this model's tokenizer has no chat template; "
                        "--conversation_template vicuna needs none")
