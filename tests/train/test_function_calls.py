"""The demo's data: what is held out was never seen."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "examples" / "function_calls.py"


@pytest.fixture(scope="module")
def calls() -> ModuleType:
    spec = importlib.util.spec_from_file_location("function_calls", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answers(rows: list[Any]) -> list[Any]:
    return [json.loads(row["messages"][-1]["content"]) for row in rows]


def values(rows: list[Any]) -> set[Any]:
    return {value for call in answers(rows) for value in call["arguments"].values()}


def test_no_argument_value_is_shared(calls: ModuleType) -> None:
    seen, held = values(calls.train(size=4000)), values(calls.heldout(size=2000))
    assert len(held) > 60
    assert {str(v).lower() for v in seen}.isdisjoint(str(v).lower() for v in held)


def test_no_pattern_and_no_request_is_shared(calls: ModuleType) -> None:
    for _, train, heldout in calls.FUNCTIONS.values():
        assert set(train).isdisjoint(heldout)
        assert len(heldout) >= 4

    def shape(row: Any) -> str:  # the request without its values
        text = row["messages"][-2]["content"].lower()
        call = json.loads(row["messages"][-1]["content"])["arguments"]
        for value in sorted(call.values(), key=lambda v: -len(str(v))):
            text = text.replace(str(value).lower(), "_", 1)
        return re.sub(r"[.!?]$", "", text)

    assert {shape(r) for r in calls.train(size=3000)}.isdisjoint(shape(r) for r in calls.heldout(size=1500))


def test_every_value_is_in_its_request(calls: ModuleType) -> None:
    for row in calls.train(size=500) + calls.heldout(size=300):
        request = row["messages"][-2]["content"].lower()
        for value in json.loads(row["messages"][-1]["content"])["arguments"].values():
            assert str(value).lower() in request


def test_shares_and_determinism(calls: ModuleType) -> None:
    names = [call["name"] for call in answers(calls.heldout(size=60))]
    assert {names.count(name) for name in calls.FUNCTIONS} == {6}
    assert calls.train(seed=3, size=50) == calls.train(seed=3, size=50)
    assert calls.train(seed=3, size=50) != calls.train(seed=4, size=50)


def test_as_a_command(tmp_path: Path, calls: ModuleType) -> None:
    subprocess.run([sys.executable, str(PATH), str(tmp_path)], check=True)
    lines = (tmp_path / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == calls.heldout()
