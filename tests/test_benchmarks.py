"""The benchmark scripts run, measure what they say, and write only their own section of the results."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
pytest.importorskip("peft", reason="the benchmarks compare with peft: pip install 'veneer[peft]'")


def run(script: str, results: pathlib.Path, *options: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), "--results", str(results), "--threads", "1",
               "--repetitions", "2", "--warmup", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def table(text: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
             if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def sizes(m: int, k: int, n: int) -> list[str]:
    return ["--m", str(m), "--k", str(k), "--n", str(n)]


def test_layers_compares_all_contenders(tmp_path):
    results = tmp_path / "RESULTS.md"
    results.write_text("# Mine\n\nkept\n\n<!-- layers: begin -->\nstale section\n<!-- layers: end -->\n\nalso kept\n")
    shown = table(run("layers.py", results, *sizes(16, 32, 24), "--rank", "2"))
    seen = {(row["dtype"], row["method"], row["contender"]) for row in shown}
    methods = ("LoRA", "LoRA, dropout 0.05", "LoRA, pissa", "DoRA", "AdaLoRA", "LoHa, r=8", "LoKr, r=8", "VB-LoRA, r=4",
               "VeRA, r=256", "RandLoRA, r=32")
    contenders = (("fp32", "Veneer"), ("fp32", "peft"), ("bf16", "Veneer"), ("bf16", "peft"),
                  ("bf16", "peft, 16-bit adapter"))
    assert seen == {(dtype, method, name) for dtype, name in contenders for method in methods} | {
        ("bf16", "", "frozen"), ("fp32", "", "frozen")}
    for row in shown:
        assert bool(row["÷ peft [quartiles]"]) == (row["contender"] == "Veneer")
    text = results.read_text()
    assert text.startswith("# Mine\n\nkept\n")
    assert text.endswith("also kept\n")
    assert "stale section" not in text
    assert table(text) == shown
    assert str(tmp_path) not in text
    assert "python benchmarks/layers.py --threads 1" in text
    # A bar is for the sizes it was set for.
    assert all(row["bar"] == "" for row in shown)


def test_several_sizes_give_a_row_for_every_method_and_a_verdict(tmp_path):
    results = tmp_path / "RESULTS.md"
    text = run("layers.py", results, "--m", "8", "16", "--k", "32", "48", "--n", "24", "32", "--rank", "2",
               "--methods", "lora", "vblora", "--seconds-per-cell", "0.01")
    shown = table(text)
    sizes = [("32 → 24", "8"), ("32 → 24", "16"), ("48 → 32", "8"), ("48 → 32", "16")]
    assert [(row["dtype"], row["k → n"], row["m"], row["method"]) for row in shown] == [
        (dtype, *size, method) for dtype in ("bf16", "fp32") for size in sizes for method in ("LoRA", "VB-LoRA, r=4")]
    for row in shown:
        assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", row["Veneer ÷ peft [quartiles]"])
        assert bool(row["peft 16-bit ÷ frozen"]) == (row["dtype"] == "bf16")
    # The verdict goes by ratios, the table shows them rounded.
    ratios = [float(row[column].split()[0]) for row in shown for column in row
              if column.startswith("Veneer ÷ peft") and row[column]]
    said = re.search(r"Slower than peft: (\d+) cells|Slower than peft: nowhere", text)
    lost = int(said.group(1) or 0)
    assert lost == len(re.findall(r"^- .* time$", text, re.MULTILINE))
    assert sum(ratio > 1 for ratio in ratios) <= lost <= sum(ratio >= 1 for ratio in ratios)
    assert "More peak memory than peft: " in text
    assert "<!-- layer sizes: begin -->" in results.read_text()


def test_layer_memory_is_exact(tmp_path):
    """A frozen layer keeps nothing; a LoRA layer keeps its input and S."""
    shown = table(run("layers.py", tmp_path / "r.md", *sizes(512, 256, 128), "--rank", "16", "--methods", "lora",
                      "--dtypes", "fp32"))
    kept = {row["contender"]: float(row["kept MiB"]) for row in shown}
    assert kept["frozen"] == 0
    exact = (512 * 256 + 512 * 16) * 4 / 2**20
    # Beside those two: B times its scale (128, 16), and nothing of the size of x or y.
    assert exact - 0.005 <= kept["Veneer"] <= exact + 2 * 128 * 16 * 4 / 2**20


def test_step_compares_all_contenders(tmp_path):
    results = tmp_path / "RESULTS.md"
    shown = table(run("step.py", results, "--model", "tiny", "--batch", "2", "--tokens", "16", "--rank", "2"))
    assert [(row["dtype"], row["contender"]) for row in shown] == [
        (dtype, name) for dtype in ("bf16", "fp32") for name in ("frozen", "Veneer", "peft")]
    for row in shown:
        assert float(row["step s"]) > 0
        assert float(row["tokens/s"]) > 0
        assert float(row["peak MiB"]) > 0
        assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", row["step ÷ frozen [quartiles]"])
    assert "<!-- step: begin -->" in results.read_text()


def test_an_unknown_method_is_named(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "layers.py"), "--methods", "lroa"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "invalid choice: 'lroa'" in done.stderr


def test_sizes_that_do_not_go_together_are_refused():
    for options in (["--k", "8", "16", "--n", "8"], ["--sizes", "all", "--m", "8"]):
        command = [sys.executable, str(BENCHMARKS / "layers.py"), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2
        assert "--k and --n go together" in done.stderr or "--sizes all has its own" in done.stderr


def test_starts_tells_what_each_takes(tmp_path):
    torch.manual_seed(0)
    model, results = tmp_path / "m.safetensors", tmp_path / "RESULTS.md"
    save_file({f"encoder.layer.{i}.dense.weight": torch.randn(40, 30 + i) for i in range(2)}, model)
    command = [sys.executable, str(BENCHMARKS / "starts.py"), "--results", str(results), "--threads", "1",
               "--rank", "4", "--starts", "kaiming", "pissa", "pissa_niter_8", "--model", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    none, exact, near = table(done.stdout)
    assert float(none["‖s·BA‖² ÷ ‖W‖²"]) == 0
    assert float(exact["‖W − s·BA‖ ÷ the least"]) == 1
    assert 1 <= float(near["worst"]) < 1.01
    assert "2 linear weights of m.safetensors, r=4" in results.read_text()


def test_storages_has_a_row_for_every_scheme(tmp_path):
    results = tmp_path / "RESULTS.md"
    dense, packed, wide = table(run("storages.py", results, "--out", "32", "--in", "64", "--rows", "8", "--rank", "2",
                                    "--schemes", "nf4", "nf8"))
    assert float(dense["bytes per number"]) == 2
    assert dense["read, ms"] == ""
    assert float(packed["bytes per number"]) < 0.6 < 1 < float(wide["bytes per number"]) < 1.1
    assert 0.05 < float(packed["‖Q − W‖ ÷ ‖W‖"]) < 0.15
    assert "A weight (32, 64) of normal numbers, bf16; LoRA r=2" in results.read_text()
