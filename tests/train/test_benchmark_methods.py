"""benchmarks/methods.py: one run for each method into a table, and a search for rates that sees training data alone."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from tiny import chat_rows, write_jsonl

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("peft", reason="what the benchmarks share compares with peft")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("methods")


def table(text: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
             if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def test_every_method_trains_the_demo(
    project: Path, methods: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    methods.main(["--config", "config.yaml", "--steps", "6", "--threads", "1", "--results", "RESULTS.md"])
    shown = table(capsys.readouterr().out)
    assert [row["method"] for row in shown] == ["(none)", *(trial.label for trial in methods.TRIALS.values())]
    for row in shown[1:]:
        assert row["steps"] == "6"
        assert row["checks"] == "passed"
        assert row["held-out loss"] != shown[0]["held-out loss"]
        assert int(row["adapter bytes"].replace(",", "")) > 0
    parameters = {row["method"]: int(row["trainable parameters"].replace(",", "")) for row in shown[1:]}
    assert parameters["LoRA, r=16"] == parameters["LoRA, r=16, dropout 0.05"] < parameters["DoRA, r=16"]
    text = Path("RESULTS.md").read_text()
    assert table(text) == shown
    assert "<!-- methods: begin -->" in text
    assert "python benchmarks/methods.py --config config.yaml --steps 6 --threads 1\n" in text
    assert str(project) not in text


def test_a_search_never_sees_the_held_out_set(
    project: Path, methods: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for offset in (100, 203):
        write_jsonl(project / "heldout.jsonl", chat_rows(5, offset=offset))
        methods.main(["--search", "--config", "config.yaml", "--methods", "lora", "vera", "--steps", "3",
                      "--factors", "0.1", "5", "--validation", "0.25", "--threads", "1", "--results", "RESULTS.md"])
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]
    shown = table(found[0])
    assert [(row["method"], float(row["learning rate"])) for row in shown] == [
        (trial.label, pytest.approx(trial.rate * factor))
        for trial in (methods.TRIALS["lora"], methods.TRIALS["vera"]) for factor in (0.1, 5)]
    for trial in (shown[:2], shown[2:]):
        best = min(trial, key=lambda row: float(row["validation loss"]))
        assert [row[""] for row in trial] == ["best" if row is best else "" for row in trial]
    assert not Path("RESULTS.md").exists()
