"""`model.quantize`: the training command over a base in fewer bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import veneer
from veneer.storage.packed import PackedLinear
from veneer.storage.recent import RECENT
from veneer.train import checks, run
from veneer.train.cli import main
from veneer.train.console import Console
from veneer.train.memory import estimate
from veneer.train.model import ModelError, load_model
from veneer.train.schema import ConfigError
from veneer.train.settings import ModelSettings, load_settings, parse_settings
from veneer.train.settings_schema import settings_schema

FAST = ["evaluation.generate=false", "output.report=false", "training.max_steps=2"]
LIBRARIES = {"bnb-nf4": "bitsandbytes", "bnb-int8": "bitsandbytes", "torchao-int8": "torchao", "hqq-4": "hqq"}


def train(*overrides: str, **options: Any) -> Any:
    return run.train(load_settings("config.yaml", overrides), **options)


def test_a_whole_run_over_nf4(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = train("training.epochs=8", "training.batch_size=8", "model.quantize=nf4")
    assert results.after.loss < results.before.loss - 0.3
    assert [(check.name, check.passed) for check in results.checks] == [("reload", True), ("merge", True)]
    assert "bit-equal" in results.checks[0].detail
    assert "merged, dequantised and rounded to bfloat16, KL " in results.checks[1].detail
    assert dict(results.facts)["Model"].endswith("linear weights held as nf4")
    assert "14 weights held as nf4: 246 kB as numbers, 31.7 kB so" in capsys.readouterr().out
    assert len(results.norms) == 14
    assert json.loads(Path("out/config.json").read_text())["model"]["quantize"] == "nf4"


@pytest.mark.parametrize(("scheme", "dtype"), [
    ("{scheme: nf4, block: 32, double: false}", "float32"), ("nf8", "bfloat16"), ("nf2", "float16"),
    *((scheme, "float32") for scheme in LIBRARIES), ("bnb-nf4", "bfloat16"), ("torchao-int8", "bfloat16"),
])
def test_every_scheme_reloads_and_merges(project: Path, scheme: str, dtype: str) -> None:
    if scheme in LIBRARIES:
        pytest.importorskip(LIBRARIES[scheme])
    results = train(*FAST, f"model.quantize={scheme}", f"model.dtype={dtype}", "training.learning_rate=0.05")
    assert [(check.name, check.passed) for check in results.checks] == [("reload", True), ("merge", True)], \
        [check.detail for check in results.checks]
    assert max(results.norms.values()) > 0


def test_a_merge_that_goes_wrong_is_seen(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = veneer.dequantize

    def wrong(model: Any) -> int:
        done = real(model)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.normal_()
        return done

    monkeypatch.setattr(veneer, "dequantize", wrong)
    found = {check.name: check.passed for check in train(*FAST, "model.quantize=nf4").checks}
    assert found == {"reload": True, "merge": False}


def test_options_reach_the_codec(model_folder: Path) -> None:
    settings = ModelSettings(name=str(model_folder), quantize={"scheme": "nf4", "block": 32, "double": False})
    model: Any = load_model(settings).model
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, PackedLinear)
    assert (layer.packed_block, layer.weight_outer) == (32, None)
    assert type(model.lm_head) is torch.nn.Linear


def test_weights_are_kept_for_the_run_only(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    real = checks.check_adapter
    monkeypatch.setattr("veneer.train.run._fit", lambda *args: limits.append(RECENT.limit))
    monkeypatch.setattr(checks, "check_adapter", lambda *args: limits.append(RECENT.limit) or real(*args))
    train(*FAST, "model.quantize=nf4", "model.keep_dense_mb=0.5")
    assert limits == [2**19, 0]


def test_gradient_checkpointing_changes_nothing(project: Path) -> None:
    losses = [[row["loss"] for row in train(*FAST, "model.quantize=nf4", "output.check_merge=false",
                                            "output.overwrite=true", *more).metrics if "loss" in row]
              for more in ([], ["training.gradient_checkpointing=true", "model.keep_dense_mb=1"])]
    assert losses[0] == losses[1]


def test_the_estimate_of_memory_knows_packed_weights(project: Path) -> None:
    def rows(*overrides: str) -> dict[str, int]:
        settings = load_settings("config.yaml", overrides)
        job = run.prepare(settings, Console())
        return dict(estimate(job.model, job.plan, job.train, settings))

    dense, packed = rows(), rows("model.quantize=nf4", "model.keep_dense_mb=0.01")
    linear = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 96)
    assert dense["base weights"] - packed["base weights"] == pytest.approx(linear * 3.48, rel=0.01)
    assert packed["packed weights as numbers, at a time"] == 64 * 96 * 4 + int(0.01 * 2**20)
    assert "packed weights as numbers, at a time" not in dense
    assert {k: v for k, v in dense.items() if "base" not in k and k != "all"}.items() <= packed.items()


def test_chat_and_merge_hold_the_base_alike(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*FAST, "model.quantize=nf4", "adapter.targets=['*.q_proj']", "training.learning_rate=0.05"]
    assert main(["train", "config.yaml", *(word for o in options for word in ("--set", o))]) == 0
    assert main(["chat", "--adapter", "out", "--prompt", "say a", "--max-new-tokens", "3"]) == 0
    assert main(["merge", "out", "--output", "merged"]) == 0
    assert main(["plan", "config.yaml", "--set", "model.quantize=nf4"]) == 0
    merged: Any = load_model(ModelSettings(name="./merged")).model
    held: Any = load_model(ModelSettings(**json.loads(Path("out/config.json").read_text())["model"])).model
    veneer.load(held, "out/adapter")
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, held(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


GOOD: dict[str, Any] = {"model": {"name": "m"}, "adapter": {"method": "lora"}, "data": {"train": "a.jsonl"}}


@pytest.mark.parametrize(("model", "adapter", "message"), [
    ({"quantize": "nf5"}, {}, r"model.quantize is 'nf5'; possible: nf4, .*gguf; did you mean 'nf"),
    ({"quantize": {"block": 32}}, {}, r"model.quantize as a mapping needs the key 'scheme', one of nf4, "),
    ({"quantize": {"scheme": "nf4", "blocks": 1}}, {}, r"model.quantize: .*no option 'blocks'; did you mean 'block'"),
    ({"quantize": {"scheme": "gguf", "block": 1}}, {}, r"'gguf' keeps what the file has and takes no options, got bl"),
    ({"quantize": 4}, {}, r"model.quantize must be text or a mapping, got 4"),
    ({"keep_dense_mb": 5}, {}, r"model.keep_dense_mb has no effect without model.quantize"),
    ({"quantize": "nf4", "keep_dense_mb": -1}, {}, r"model.keep_dense_mb must be at least 0"),
    ({"quantize": "nf4"}, {"init": "loftq"}, r"the start of LoRA\(rank=8, init='loftq'\) rewrites base weights, .*dro"),
    ({"quantize": "nf4"}, {"init": "pissa", "residual": "base"}, r"rewrites base weights, which model.quantize would"),
])
def test_mistakes_are_named(model: dict[str, Any], adapter: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings({**GOOD, "model": {"name": "m", **model}, "adapter": {"method": "lora", **adapter}}, Path("."))


def test_a_missing_library_is_told_before_the_model_is_loaded(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    monkeypatch.setattr("veneer.train.job.load_model", None)
    assert main(["train", "config.yaml", "--set", "model.quantize=bnb-nf4"]) == 2
    assert "model.quantize: bitsandbytes is not installed: pip install" in capsys.readouterr().err


def test_gguf_needs_a_gguf_file(model_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"'gguf' keeps the blocks of a GGUF file, and '.*' is none; take another"):
        load_model(ModelSettings(name=str(model_folder), quantize="gguf"))


def test_the_schema_has_the_schemes() -> None:
    model = settings_schema()["properties"]["model"]["anyOf"][1]["properties"]
    names = model["quantize"]["anyOf"][0]["enum"]
    assert {"nf4", "bnb-nf4", "torchao-int8", "gguf"} <= set(names)
    assert model["keep_dense_mb"]["minimum"] == 0


def test_the_example_is_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[2] / "examples" / "qlora.yaml"
    assert yaml.safe_load(path.read_text())["model"]["quantize"]
    assert load_settings(path).model.quantize is not None
