"""The five forms of a training row and how each becomes an example.

Every row is either recognised or reported with its place; none is dropped in silence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from veneer.method import nearest
from veneer.train.schema import ConfigError

Message = dict[str, str]


class DataError(ConfigError):
    """Rows that cannot be used: the message lists them by file and line."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example: either `messages` (a chat), or `prompt` and `text` (the completion; prompt "" for plain text)."""

    place: str  # file:line, for messages to the user
    form: str
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    text: str = ""

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)


class RowError(ValueError):
    """Why one row is unusable; the reader adds file and line."""


# roles as they are called in the wild → as chat templates know them (ShareGPT's names and OpenAI's)
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_FORMS = (
    "messages (a list of {role, content}); conversations (ShareGPT: a list of {from, value}); "
    "instruction, input, output (Alpaca); prompt, completion; text"
)


def examples_from_rows(rows: Iterable[tuple[str, Any]]) -> list[Example]:
    """Examples from (place, row) pairs. Raises `DataError` listing the first unusable rows and their number."""
    examples, problems = [], []
    for place, row in rows:
        try:
            examples.append(parse_row(row, place))
        except RowError as error:
            problems.append(f"{place}: {error}")
    if problems:
        shown = problems[:5]
        more = [f"... and {len(problems) - 5} more"] if len(problems) > 5 else []
        total = len(problems) + len(examples)
        raise DataError("\n  ".join([f"{len(problems)} of {total} rows cannot be used:", *shown, *more]))
    return examples


def parse_row(row: Any, place: str) -> Example:
    """One row in whichever form it has. Raises `RowError`."""
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError(f"expected an object with named fields, got {_short(row)}")
    if "messages" in row:
        return Example(place=place, form="messages", messages=_messages(row["messages"], "messages"))
    if "conversations" in row:
        messages = _messages(row["conversations"], "conversations")
        if row.get("system"):
            messages = ({"role": "system", "content": _text(row, "system")}, *messages)
        return Example(place=place, form="sharegpt", messages=messages)
    if "instruction" in row and "output" in row:
        return Example(place=place, form="alpaca", messages=_alpaca(row))
    if "prompt" in row and "completion" in row:
        return _prompt_completion(row, place)
    if "text" in row:
        return Example(place=place, form="text", text=_text(row, "text"))
    known = ["messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text"]
    hints = [f"{key!r}{nearest(str(key), known)}" for key in row]
    listed = ", ".join(hints) or "none"
    stop = "" if listed.endswith("?") else "."
    raise RowError(f"no known form; its fields: {listed}{stop} Known forms: {_FORMS}")


def _alpaca(row: Mapping[str, Any]) -> tuple[Message, ...]:
    request = _text(row, "instruction")
    extra = row.get("input") or ""
    if not isinstance(extra, str):
        raise RowError(f"'input' must be text, got {_short(extra)}")
    if extra.strip():
        request += "\n\n" + extra
    chat = [{"role": "user", "content": request}, {"role": "assistant", "content": _text(row, "output")}]
    if row.get("system"):
        chat.insert(0, {"role": "system", "content": _text(row, "system")})
    return tuple(chat)


def _prompt_completion(row: Mapping[str, Any], place: str) -> Example:
    """As text they are joined as they stand; as lists of messages they are one chat."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = _messages([*prompt, *completion], "prompt + completion")
        return Example(place=place, form="prompt/completion", messages=messages)
    text = _text(row, "completion")
    return Example(place=place, form="prompt/completion", prompt=_text(row, "prompt"), text=text)


def _messages(value: Any, field: str) -> tuple[Message, ...]:
    if isinstance(value, str):  # a CSV cell can hold a list only as JSON text
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise RowError(f"{field!r} is neither a list nor a list as JSON text: {_short(value)}") from None
    if not isinstance(value, list) or not value:
        raise RowError(f"{field!r} must be a list with at least one message, got {_short(value)}")
    messages = tuple(_message(item, f"{field}[{i}]") for i, item in enumerate(value))
    if all(m["role"] != "assistant" for m in messages):
        raise RowError(f"{field!r} has no assistant message, so there is nothing to learn from it")
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(f"{where} must be an object, got {_short(item)}")
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        hint = nearest(role.lower(), _ROLES) if isinstance(role, str) else ""
        raise RowError(f"{where} has the role {role!r}{hint or '.'} Known roles: {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise RowError(f"{where} has no text content, got {_short(content)}")
    return {"role": _ROLES[role.lower()], "content": content}


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{key!r} must be text that is not empty, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
