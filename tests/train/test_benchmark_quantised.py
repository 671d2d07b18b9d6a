"""benchmarks/qlora.py and benchmarks/inits.py on a tiny model: every contender in a table, a plot."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
gguf = pytest.importorskip("gguf", reason="pip install 'veneer[gguf]'")
for library in ("peft", "bitsandbytes", "torchao", "matplotlib"):
    pytest.importorskip(library, reason="the benchmarks compare with it")


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def table(text: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
             if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def use(project: Path, **model: Any) -> None:
    path = project / "config.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**config, "model": model}))


def test_every_base_learns_beside_peft(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    qlora = script("qlora", monkeypatch)
    script("tiny_gguf", monkeypatch).write_tiny_gguf(project / "tiny.gguf")
    use(project, name="./tiny.gguf")
    qlora.main(["--config", "config.yaml", "--steps", "4", "--threads", "1", "--results", "RESULTS.md"])
    shown = table(capsys.readouterr().out)
    assert [(row["contender"], row["base"]) for row in shown] == [
        ("Veneer", "nf4"), ("Veneer", "bnb-nf4"), ("Veneer", "torchao-int8"), ("Veneer", "gguf, the file's blocks"),
        ("peft", "bnb-nf4")]
    for row in shown:
        assert float(row["step s"]) > 0
        assert 0 < float(row["kept MiB"]) < float(row["peak MiB"])
        assert float(row["held-out loss"]) > 0
        assert row["exact match"].endswith("/6")
        assert float(row["merged KL"]) < (1e-3 if row["contender"] == "Veneer" else 1)
    text = Path("RESULTS.md").read_text()
    assert table(text) == shown
    assert "<!-- qlora: begin -->" in text
    assert str(project) not in text


def test_a_piece_has_a_section_of_its_own(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    qlora = script("qlora", monkeypatch)
    qlora.main(["--config", "config.yaml", "--steps", "2", "--threads", "1", "--results", "RESULTS.md", "--only", "nf4",
                "--gradient-checkpointing", "--no-generate"])
    assert [row["base"] for row in table(capsys.readouterr().out)] == ["nf4", "bnb-nf4"]
    assert "<!-- qlora nf4 fp32 checkpointing: begin -->" in Path("RESULTS.md").read_text()


def test_curves_of_every_start(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inits = script("inits", monkeypatch)
    inits.main(["--config", "config.yaml", "--steps", "4", "--every", "2", "--rank", "2", "--threads", "1",
                "--residual", "--results", "RESULTS.md", "--plot", "curves.png"])
    shown = table(capsys.readouterr().out)
    moving = {f"{key}, residual base" for key in inits.MOVING}
    assert {row["start"] for row in shown} == {*inits.STARTS, *moving, "kaiming on nf4"}
    last = [float(row["held out, step 4"].split()[0]) for row in shown]
    assert last == sorted(last)
    assert all(("(" in row["held out, step 4"]) == (row["start"] != "kaiming") for row in shown)
    exact = [row["at the start"] for row in shown if row["start"] in ("kaiming", "pissa", "eva", "corda")]
    assert all(text.startswith("the output has the base's bits") for text in exact)
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    assert Path("curves.png").stat().st_size < 100_000
    assert "![Held-out loss over steps](curves.png)" in Path("RESULTS.md").read_text()
