"""Starts of the adapter in the training command: each from one line of YAML."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from veneer.inits import init_names
from veneer.method import VeneerError
from veneer.statistics import Statistics
from veneer.train import run, start
from veneer.train.schema import ConfigError
from veneer.train.settings import load_settings, parse_settings
from veneer.train.settings_checks import needing_statistics
from veneer.train.settings_schema import settings_schema

QUIET = ["output.report=false", "evaluation.generate=false", "training.max_steps=2", "training.learning_rate=0.002"]
LOFTQ = "{init: loftq, bits: 4, iterations: 5}"


def train(*overrides: str, resume: str | None = None) -> Any:
    return run.train(load_settings("config.yaml", [*QUIET, *overrides]), resume=resume)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "eva", "corda", "lora_ga", "{init: eva, rho: 1.5}"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_line_starts_where_the_base_is(project: Path, init: str, dtype: str) -> None:
    results = train(f"adapter.init={init}", "adapter.rank=3", f"model.dtype={dtype}")
    assert [(check.name, check.passed) for check in results.checks] == [("reload", True), ("merge", True)], \
        [check.detail for check in results.checks]
    assert "bit-equal" in results.checks[0].detail
    fact = dict(results.facts)["Start"]
    if init == "orthogonal":  # BA = 0 up to rounding
        assert float(re.search("moves by KL ([^ ]+) ", fact)[1]) < 1e-5
    else:
        assert "; the output has the base's bits" in fact
    calibrated = re.match(r"\d+ tokens of training data in ", dict(results.facts).get("Calibration", ""))
    assert (calibrated is not None) == bool(needing_statistics(load_settings("config.yaml", [f"adapter.init={init}"])
                                                               .adapter.rules))


def test_loftq_packs_what_it_lies_on(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = train(f"adapter.init={LOFTQ}")
    assert [(check.name, check.passed) for check in results.checks] == [("reload", True), ("merge", True)]
    assert "merged, dequantised and rounded to bfloat16, KL" in results.checks[1].detail
    fact = dict(results.facts)["Start"]
    moved, alone, helped = re.search(r"moves by KL (.+?) from .* off by (.+?)%, by (.+?)% with the pair", fact).groups()
    assert 0 < float(moved) < 0.1
    assert 0 < float(helped) < float(alone) < 15
    assert "(median of 7 weights)" in fact
    assert f"Start: {fact}" in capsys.readouterr().out


def test_a_residual_base_may_be_rounded(project: Path) -> None:
    results = train("adapter.init=pissa", "adapter.residual=base")
    reload, merge = results.checks
    assert reload.passed
    assert merge.passed
    assert "bit-equal" in reload.detail or "the start rounded what it left of the base weights" in reload.detail


def test_eva_deals_ranks_out_and_says_so(project: Path) -> None:
    results = train("adapter.init=eva", "adapter.rank=4", "calibration={batches: 3, batch_size: 8}")
    facts = dict(results.facts)
    low, high = map(int, re.search(r"ranks (\d+) to (\d+) \(median", facts["Start"]).groups())
    assert low < 4 < high <= 8
    own, equal = map(float, re.search(r"A spans ([\d.]+)% .* \(([\d.]+)% with equal ranks\)", facts["Start"]).groups())
    assert 0 < equal < 100
    assert 0 < own < 100


def test_it_works_over_a_quantised_base(project: Path) -> None:
    results = train("adapter.init=eva", "model.quantize=nf4")
    assert [(check.name, check.passed) for check in results.checks] == [("reload", True), ("merge", True)]
    assert "; the output has the base's bits" in dict(results.facts)["Start"]


def test_a_file_of_statistics_is_written_once_and_used_again(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["adapter.init=corda", "calibration.statistics=s.safetensors", "output.overwrite=true"]
    first = train(*options)
    tokens = Statistics.load("s.safetensors").tokens
    monkeypatch.setattr(start, "calibrate", None)
    again = train(*options)
    assert first.metrics[-1]["loss"] == again.metrics[-1]["loss"]
    assert f"Calibration: {tokens:,} tokens, from s.safetensors" in capsys.readouterr().out


def test_statistics_of_another_model_are_refused(project: Path, tokenizer: Any) -> None:
    from tiny import tiny_model

    options = ["adapter.init=corda", "calibration.statistics=s.safetensors", "output.overwrite=true"]
    train(*options)
    tiny_model(tokenizer, seed=1).save_pretrained("other")
    tokenizer.save_pretrained("other")
    with pytest.raises(VeneerError, match="these statistics are of another model: "):
        train(*options, "model=./other")
    with pytest.raises(VeneerError, match=r"starts from the statistic 'inputs' of veneer\.calibrate, and there is no"):
        train(*options, "adapter.init=eva")


@pytest.mark.parametrize("init", ["pissa", "eva", LOFTQ])
def test_a_resumed_run_starts_from_the_same(project: Path, init: str) -> None:
    options = [f"adapter.init={init}", "training.max_steps=6", "training.save_every=3", "training.keep_checkpoints=9"]
    whole = train(*options)
    shutil.copytree("out/checkpoint-3", "second/checkpoint-3")
    shutil.copy("out/metrics.jsonl", "second/metrics.jsonl")
    if init == "eva":
        shutil.copy(f"out/{start.STATISTICS}", f"second/{start.STATISTICS}")
    again = train(*options, "output.directory=second", resume="last")
    losses = [{row["step"]: row["loss"] for row in r.metrics if "loss" in row} for r in (whole, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    # LoftQ rewrites the base, so that its file is not PEFT's and has another name.
    first, second = (safetensors.torch.load_file(next(Path(folder, "adapter").glob("*.safetensors")))
                     for folder in ("out", "second"))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=1e-4, atol=1e-7)


GOOD: dict[str, Any] = {"model": "m", "adapter": {"method": "lora"}, "data": {"train": "a.jsonl"}}


@pytest.mark.parametrize(("changes", "message"), [
    ({"adapter": {"method": "lora", "init": "pisa"}}, r"adapter: LoRA: unknown init 'pisa'; did you mean 'pissa'\?"),
    ({"adapter": {"method": "lora", "init": {"init": "loftq", "bit": 4}}}, r"init 'loftq' has no option 'bit'; did yo"),
    ({"calibration": {"batches": 3}}, r"calibration has no effect: nothing in adapter starts from data"),
    ({"adapter": {"method": "lora", "init": "eva"}, "calibration": {"batches": 0}},
     r"calibration.batches must be at least 1, got 0"),
    ({"adapter": {"method": "lora", "init": "eva"}, "calibration": {"statistics": "s.pt"}},
     r"calibration.statistics is the name of one file that ends in .safetensors, got 's.pt'"),
])
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings({**GOOD, **changes}, Path("."))


def test_the_schema_has_the_starts() -> None:
    text = json.dumps(settings_schema())
    for name in init_names():
        assert f'"const": "{name}"' in text
    assert yaml.safe_load("{init: loftq, bits: 4}")["init"] == "loftq"
    assert "calibration" in settings_schema()["properties"]


@pytest.mark.slow
def test_two_processes_agree_on_the_start(project: Path) -> None:
    sets = [part for o in [*QUIET, "adapter.init=eva", "calibration.batches=2"] for part in ("--set", o)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "veneer.train.cli"]
    done = subprocess.run([*launch, "train", "config.yaml", *sets], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Calibration: ") == 1
    assert "bit-equal" in done.stdout
