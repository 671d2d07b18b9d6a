from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import write_jsonl

from veneer.train.data import load_data, read_files, split
from veneer.train.forms import DataError, examples_from_rows, parse_row
from veneer.train.schema import ConfigError
from veneer.train.settings import DataSettings

CHAT = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"})


@pytest.mark.parametrize(
    ("row", "form", "messages"),
    [
        ({"messages": list(CHAT)}, "messages", CHAT),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, "sharegpt", CHAT),
        ({"instruction": "hi", "input": "", "output": "yo"}, "alpaca", CHAT),
        ({"instruction": "hi", "output": "yo"}, "alpaca", CHAT),
        ({"prompt": [CHAT[0]], "completion": [CHAT[1]]}, "prompt/completion", CHAT),
    ],
)
def test_forms_of_chats(row: Any, form: str, messages: Any) -> None:
    example = parse_row(row, "f:1")
    assert (example.form, example.messages, example.is_chat) == (form, messages, True)


def test_sharegpt_system_and_alpaca_input() -> None:
    row = {"system": "S", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
    assert parse_row(row, "").messages == ({"role": "system", "content": "S"}, *CHAT)
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert parse_row(row, "").messages[0]["content"] == "Add.\n\n1 2"


def test_forms_of_text() -> None:
    pair = parse_row({"prompt": "2+2=", "completion": "4"}, "")
    assert (pair.form, pair.prompt, pair.text) == ("prompt/completion", "2+2=", "4")
    plain = parse_row({"text": "once"}, "")
    assert (plain.form, plain.prompt, plain.text) == ("text", "", "once")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"mesages": []}, r"no known form; its fields: 'mesages'; did you mean 'messages'\?"),
        ({"messages": []}, r"'messages' must be a list with at least one message, got \[\]"),
        ({"messages": [CHAT[0]]}, "has no assistant message"),
        ({"messages": [{"role": "usr", "content": "x"}]}, r"messages\[0\] has the role 'usr'; did you mean 'user'\?"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\] has no text content, got None"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object, got 'hi'"),
        ({"instruction": "x", "output": " "}, r"'output' must be text that is not empty, got ' '"),
        ({"text": 5}, "'text' must be text that is not empty, got 5"),
        ([1], r"expected an object with named fields, got \[1\]"),
    ],
)
def test_wrong_rows(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        examples_from_rows([("f:1", row)])


def test_wrong_rows_are_listed_by_file_and_line_and_counted(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": "fine"}] + [{"txt": "x"}] * 7
    write_jsonl(tmp_path / "d.jsonl", rows)
    with (tmp_path / "d.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError) as caught:
        read_files(["d.jsonl"], tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "8 of 9 rows cannot be used:"
    assert lines[1].strip().startswith("d.jsonl:2: no known form; its fields: 'txt'; did you mean 'text'?")
    assert lines[5].strip().startswith("d.jsonl:6: ")
    assert lines[6].strip() == "... and 3 more"
    write_jsonl(tmp_path / "e.jsonl", [{"text": "fine"}])
    with (tmp_path / "e.jsonl").open("a") as file:
        file.write("\n{broken\n")
    with pytest.raises(DataError, match=r"e.jsonl:3: not valid JSON \(Expecting property name"):
        read_files(["e.jsonl"], tmp_path)


def test_json_and_csv(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
    rows = 'instruction,input,output\n"say, ""hi""",,"two\nlines"\nx,y,z\n'
    (tmp_path / "d.csv").write_text(rows, encoding="utf-8-sig")
    (tmp_path / "chat.csv").write_text('messages\n"' + json.dumps(list(CHAT)).replace('"', '""') + '"\n')
    found = read_files(["d.json", "d.csv", "chat.csv"], tmp_path)
    assert [e.form for e in found] == ["text", "text", "alpaca", "alpaca", "messages"]
    assert found[2].messages[0]["content"] == 'say, "hi"'
    assert found[2].messages[1]["content"] == "two\nlines"
    assert found[3].messages[0]["content"] == "x\n\ny"
    assert found[4].messages == CHAT
    assert found[3].place == "d.csv:4"


def test_file_mistakes(tmp_path: Path) -> None:
    (tmp_path / "short.csv").write_text("prompt,completion\nonly\n")
    with pytest.raises(DataError, match=r"short.csv:2: not as many fields as the header \(prompt, completion\)"):
        read_files(["short.csv"], tmp_path)
    (tmp_path / "d.json").write_text('{"text": "a"}')
    with pytest.raises(DataError, match=r"d.json must hold a list of rows, got dict; for one row a line, use .jsonl"):
        read_files(["d.json"], tmp_path)
    (tmp_path / "bad.json").write_text('[\n{"text": }]')
    with pytest.raises(DataError, match=r"bad.json:2: not valid JSON"):
        read_files(["bad.json"], tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"the data file 'empty.jsonl' has no rows"):
        read_files(["empty.jsonl"], tmp_path)
    with pytest.raises(DataError, match=r"no data file 'x.jsonl' .*; data files there: bad.json, d.json, empty.jsonl"):
        read_files(["x.jsonl"], tmp_path)
    (tmp_path / "d.parquet").write_text("")
    with pytest.raises(DataError, match=r"unknown kind of data file '.parquet'; possible: .jsonl, .json, .csv"):
        read_files(["d.parquet"], tmp_path)
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.jsonl is not UTF-8 text: .* at byte 10"):
        read_files(["latin.jsonl"], tmp_path)


def test_heldout_share_and_system(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"prompt": str(i), "completion": "x"} for i in range(10)])
    found = load_data(DataSettings(train="d.jsonl", heldout_share=0.2), tmp_path)
    assert (len(found.train), len(found.heldout)) == (8, 2)
    assert {e.prompt for e in found.train}.isdisjoint(e.prompt for e in found.heldout)
    assert split(found.train, 0.5)[1] == split(found.train, 0.5)[1]
    with pytest.raises(ConfigError, match="of 10 examples leaves 10 to train on and 0 held out"):
        load_data(DataSettings(train="d.jsonl", heldout_share=0.01), tmp_path)
    write_jsonl(tmp_path / "c.jsonl", [{"messages": list(CHAT)}])
    chat = load_data(DataSettings(train="c.jsonl", system="Be brief."), tmp_path).train[0]
    assert chat.messages[0] == {"role": "system", "content": "Be brief."}


def test_generator_mistakes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.generator must be a Python file; there is none at '.*gen.py'"):
        load_data(DataSettings(generator="gen.py"), tmp_path)
    (tmp_path / "gen.py").write_text("def train(seed=0):\n    return [{'text': 'a'}]\n")
    with pytest.raises(DataError, match=r"gen.py has no function heldout\(\)"):
        load_data(DataSettings(generator="gen.py"), tmp_path)
    with pytest.raises(DataError, match=r"gen.py: train\(\{'sz': 1\}\): .*unexpected keyword argument 'sz'"):
        load_data(DataSettings(generator="gen.py", generator_options={"train": {"sz": 1}}), tmp_path)
    (tmp_path / "gen.py").write_text("def train():\n    return [{'tex': 'a'}]\n")
    with pytest.raises(DataError, match=r"gen.py:train\(\)\[0\]: no known form; .* did you mean 'text'"):
        load_data(DataSettings(generator="gen.py"), tmp_path)
