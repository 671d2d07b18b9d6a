"""Which part of a conversation is trained on, and what is reported instead of masked in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from veneer.fastchat.conversation import (
    SYSTEM,
    ConversationEncoder,
    end_marker,
    read_conversations,
    report,
    vicuna_text,
)
from veneer.fastchat.dataset import ConversationCollator, LazyConversations, encode_all
from veneer.train.encode import IGNORED, Encoder
from veneer.train.forms import DataError

from .nets import CHATML, conversation, golden, make_tokenizer, write

CASES = golden("preprocess_cases")
META = golden("meta")
GOOD = ["one_turn", "two_turns", "starts_with_gpt", "newlines_unicode", "trailing_space_answer", "three_turns"]
LONG = ["long_truncated", "truncated_in_2nd_answer"]
BAD = {
    "ends_with_human": "its last message is from 'human' and has no answer ('Have a nice day!')",
    "only_human": "its last message is from 'human' and has no answer ('Hi')",
    "eos_in_answer": "a message has '</s>' in it, by which the Vicuna template ends answers",
    "assistant_marker_in_user": "a message has 'ASSISTANT:' in it, by which the Vicuna template marks answers",
    "empty_answer": "a message from 'gpt' is empty",
    "two_humans": "'gpt' and 'human' do not take turns: a message from 'human' stands where one from 'gpt' belongs "
                  "('b')",
    "unknown_role": "message 1 is from 'system', and the Vicuna template has a system message of its own",
    "empty": "it has no messages",
}  # fmt: skip


def encoder(tokenizer: Any, length: int = 5000, template: str = "vicuna") -> ConversationEncoder:
    return ConversationEncoder(encoder=Encoder(tokenizer=tokenizer, max_length=length), template=template)


def read(tmp_path: Path, rows: list[Any], template: str = "vicuna", end: str = "</s>") -> tuple[list, list]:
    return read_conversations(str(write(tmp_path / "data.json", rows)), template, end)


def case(name: str) -> dict[str, Any]:
    return {"id": name, "conversations": CASES["conversations"][name]}


def trained(one: Any, tokenizer: Any) -> str:
    """What carries loss, run by run, as text."""
    return tokenizer.decode([label for label in one.labels if label != IGNORED])


def metaspace_tokenizer() -> Any:
    """Pieces with the space before them, as SentencePiece's of Llama."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    texts = [message["value"] for rows in CASES["conversations"].values() for message in rows]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    inner.train_from_iterator([*texts, SYSTEM, "USER: ASSISTANT:"], trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_the_template_is_the_originals() -> None:
    template = META["template"]
    assert template["system"] == SYSTEM
    text, spans = vicuna_text([("Who are you?", "I am Vicuna."), ("Bye", "Bye!")])
    user, assistant = template["roles"]
    sep, end = template["sep"], template["sep2"]
    assert text == (f"{SYSTEM}{sep}{user}: Who are you?{sep}{assistant}: I am Vicuna.{end}"
                    f"{user}: Bye{sep}{assistant}: Bye!{end}")  # fmt: skip
    assert [text[a:b] for a, b in spans] == [" I am Vicuna.</s>", " Bye!</s>"]


@pytest.mark.parametrize("name", GOOD)
def test_the_original_trains_on_the_same_text(tmp_path: Path, name: str) -> None:
    tokenizer = make_tokenizer()
    (found,), problems = read(tmp_path, [case(name)])
    one = encoder(tokenizer)(found)
    assert problems == []
    assert trained(one, tokenizer) == CASES["results"][name]["supervised_text"]
    assert one.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(one.input_ids[1:]) == vicuna_text(found.turns)[0]


@pytest.mark.parametrize("name", GOOD)
def test_the_space_before_an_answer_belongs_to_its_first_piece(tmp_path: Path, name: str) -> None:
    tokenizer = metaspace_tokenizer()
    (found,), _ = read(tmp_path, [case(name)])
    one = encoder(tokenizer)(found)
    pieces = tokenizer.convert_ids_to_tokens([label for label in one.labels if label != IGNORED])
    text = "".join(pieces).replace("▁", " ").replace("<0xC3><0xA9>", "é")
    assert text == CASES["results"][name]["supervised_text"]


@pytest.mark.parametrize("name", LONG)
def test_long_conversations_are_cut(tmp_path: Path, name: str) -> None:
    tokenizer = make_tokenizer()
    (found,), problems = read(tmp_path, [case(name)])
    assert problems == []
    whole = encoder(tokenizer)(found)
    first = whole.labels.index(next(label for label in whole.labels if label != IGNORED))
    assert encoder(tokenizer, first)(found) is None  # as in the original, nothing of an answer is left
    short = encoder(tokenizer, first + 3)(found)
    assert short.input_ids == whole.input_ids[: first + 3]
    assert trained(short, tokenizer) == " I "
    if name == "long_truncated":
        assert CASES["results"][name]["supervised_tokens"] == 0
    else:  # the first answer whole, and the beginning of the second
        text = CASES["results"][name]["supervised_text"].replace("</s>I", "</s> I")
        assert trained(whole, tokenizer).startswith(text)


@pytest.mark.parametrize("name", BAD)
def test_malformed_conversations_are_named(tmp_path: Path, name: str) -> None:
    result = CASES["results"][name]
    assert "error" in result or result["supervised_tokens"] == 0  # the original crashes, or masks all of it
    found, (problem,) = read(tmp_path, [case("one_turn"), case(name)])
    assert [one.label for one in found] == ["id 'one_turn' (data.json[row 1])"]
    assert problem.label == f"id {name!r} (data.json[row 2])"
    assert problem.reason.startswith(BAD[name])


def test_every_case_of_the_original_is_covered() -> None:
    assert {*GOOD, *LONG, *BAD} == set(CASES["conversations"])


@pytest.mark.parametrize(("row", "reason"), [
    ({"id": "a"}, "it has no 'conversations'; its fields: 'id'"),
    (["a"], "it is a list, not an object with 'conversations'"),
    ({"conversations": [{"from": "humn", "value": "a"}]},
     "message 1 is from 'humn'; possible: human, gpt; did you mean 'human'?"),
    ({"conversations": [{"from": "human"}]}, "message 1 is no {'from': …, 'value': text}"),
    ({"conversations": [{"from": "gpt", "value": "a"}]}, "it has no request with an answer"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "system", "value": "b"}]},
     "message 2 is from 'system'; possible: human, gpt"),
])  # fmt: skip
def test_other_rows_that_cannot_be_used(tmp_path: Path, row: Any, reason: str) -> None:
    _, (problem,) = read(tmp_path, [row])
    assert problem.reason == reason


def test_a_report_counts_and_names_up_to_a_limit(tmp_path: Path) -> None:
    _, problems = read(tmp_path, [conversation(f"c{i}", "no answer") for i in range(12)])
    lines = report(problems, 20, "data.json").splitlines()
    assert lines[0] == "12 of 20 conversations in 'data.json' cannot be used:"
    assert len(lines) == 12
    assert lines[1].startswith("  id 'c0' (data.json[row 1]): its last message is from 'human'")
    assert lines[-1] == "  ... and 2 more"


def test_jsonl_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(conversation("a", "x", "y")) + "\n{broken\n", encoding="utf-8")
    found, (problem,) = read_conversations(str(path), "vicuna", "</s>")
    assert [one.turns for one in found] == [(("x", "y"),)]
    assert str(problem).startswith("data.jsonl:2: not valid JSON")
    with pytest.raises(DataError, match=r"no data file '.*dat.json'.*data files there: data.jsonl"):
        read_conversations(str(tmp_path / "dat.json"), "vicuna", "</s>")


def test_other_end_tokens_end_answers(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "~"
    (found,), _ = read(tmp_path, [conversation("a", "x", "y</s>")], end=end_marker(tokenizer))
    assert trained(encoder(tokenizer)(found), tokenizer) == " y</s>~"
    _, (problem,) = read(tmp_path, [conversation("a", "x", "y~")], end=end_marker(tokenizer))
    assert problem.reason.startswith("a message has '~' in it")


def test_the_models_own_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    (plain, system), problems = read(tmp_path, [case("two_turns"), case("unknown_role")], "model")
    assert problems == []
    one = encoder(tokenizer, template="model")(plain)
    first, second = plain.turns[0][1], plain.turns[1][1]
    assert trained(one, tokenizer) == f"{first}</s>{second}</s>"
    assert tokenizer.decode(one.input_ids).startswith("[user]Who are you?</s>[assistant]I am Vicuna")
    other = encoder(tokenizer, template="model")(system)
    assert tokenizer.decode(other.input_ids) == "[system]s</s>[user]a</s>[assistant]b</s>"


def test_lazy_equals_eager_and_is_made_once(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    found, _ = read(tmp_path, [case("long_truncated"), case("two_turns"), case("one_turn")])
    calls, told = [], []

    def encode(one: Any) -> Any:
        calls.append(one.label)
        return encoder(tokenizer, 300)(one)

    items, empty = encode_all(found, encode)
    assert empty == ["id 'long_truncated' (data.json[row 1])"]
    calls.clear()
    lazy = LazyConversations(found, encode, 2, told.append)
    assert calls == []
    assert [lazy[1], lazy[2], lazy[1]] == [items[0], items[1], items[0]]
    assert calls == [found[1].label, found[2].label]
    assert lazy[0] == {"input_ids": [2], "attention_mask": [1], "labels": [IGNORED]}
    assert lazy[0]["labels"] == [IGNORED]
    assert told == empty


@pytest.mark.parametrize(("side", "ids", "mask"), [
    ("right", [[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
    ("left", [[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]]),
])  # fmt: skip
def test_batches_are_padded_on_the_side_that_is_asked_for(side: str, ids: Any, mask: Any) -> None:
    items = [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in ([5, 6, 7], [8])]
    batch = ConversationCollator(0, side)(items)
    assert torch.equal(batch["input_ids"], torch.tensor(ids))
    assert torch.equal(batch["attention_mask"], torch.tensor(mask))
    assert torch.equal(batch["labels"].eq(IGNORED), torch.tensor(mask).eq(0))
