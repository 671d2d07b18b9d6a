"""`veneer merge`: file by file where the base is in safetensors files, in memory elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny_model

import veneer
from veneer.train import merging
from veneer.train.cli import main
from veneer.train.model import ModelError, checkpoint_folder, load_model, load_structure
from veneer.train.settings import ModelSettings


@pytest.fixture
def sharded(tokenizer: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    tiny_model(tokenizer).bfloat16().save_pretrained(folder, max_shard_size="30KB")
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "do_sample": True}))
    return folder


@pytest.fixture
def adapter(sharded: Path, tmp_path: Path) -> Path:
    base = load_model(ModelSettings(name=str(sharded), dtype="auto")).model
    veneer.attach(base, veneer.LoRA(rank=4))
    with torch.no_grad():
        for param in veneer.trainable(base):
            param.add_(0.1 * torch.randn_like(param))
    veneer.save(base, tmp_path / "adapter")
    return tmp_path / "adapter"


def in_memory(sharded: Path, adapter: Path, dtype: str) -> dict[str, torch.Tensor]:
    base = load_model(ModelSettings(name=str(sharded), dtype=dtype)).model
    veneer.load(base, adapter)
    veneer.merge(base, keep=False)
    return veneer.detach(base).state_dict()


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_sharded_base_is_never_loaded(
    sharded: Path, adapter: Path, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    want, out = in_memory(sharded, adapter, dtype), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "from_pretrained", None)
        arguments = ["merge", str(adapter), "--model", str(sharded), "--output", str(out), "--dtype", dtype]
        assert main(arguments) == 0
        shown = capsys.readouterr()
        assert shown.out == f"merged model: {out}\n"
        count = len(list(sharded.glob("*.safetensors")))
        assert f"is written ({count} of {count})" in shown.err
        assert main(arguments) == 2
        assert "is there already and is not empty; --overwrite replaces it" in capsys.readouterr().err
        assert main([*arguments, "--overwrite", "--max-shard-size", "1GB"]) == 0
        assert [p.name for p in out.glob("*.safetensors")] == ["model.safetensors"]
    made = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert made.dtype == (torch.bfloat16 if dtype == "auto" else torch.float32)
    assert all(torch.equal(value, want[key]) for key, value in made.state_dict().items())
    assert made.generation_config.temperature == 0.5
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert made.generation_config.eos_token_id == [tokenizer.eos_token_id], "the end that training teaches"
    assert not list(tmp_path.glob(".*veneer-tmp*"))


def test_other_bases_are_merged_in_memory(
    sharded: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(merging, "checkpoint_folder", lambda settings: None)
    out = tmp_path / "out"
    arguments = ["merge", str(adapter), "--model", str(sharded), "--output", str(out), "--dtype", "bfloat16"]
    assert main([*arguments, "--max-shard-size", "5 apples"]) == 2
    assert "--max-shard-size: a size is a number of bytes, or one with a unit such as" in capsys.readouterr().err
    assert main([*arguments, "--max-shard-size", "30KB"]) == 0
    assert len(list(out.glob("*.safetensors"))) > 3
    assert main([*arguments, "--overwrite"]) == 0
    assert len(list(out.glob("*.safetensors"))) == 1
    made = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    want = in_memory(sharded, adapter, "auto")
    assert all(torch.equal(value, want[key]) for key, value in made.state_dict().items())


@pytest.mark.parametrize("by_files", [True, False])
def test_a_bias_that_loading_would_lose(
    sharded: Path, by_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load_model(ModelSettings(name=str(sharded), dtype="auto")).model
    veneer.save(veneer.attach(base, {"*q_proj": veneer.LoRA(rank=2, bias=True)}), tmp_path / "biased")
    if not by_files:
        monkeypatch.setattr(merging, "checkpoint_folder", lambda settings: None)
    assert main(["merge", str(tmp_path / "biased"), "--model", str(sharded), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "adds a bias" in error
    assert "model.layers.0.self_attn.q_proj" in error
    assert "so that it would be lost on loading" in error
    assert not (tmp_path / "out").exists()


def test_where_the_files_are(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint_folder(ModelSettings(name=str(sharded))) == sharded
    assert checkpoint_folder(ModelSettings(name="x.gguf")) is None
    (tmp_path / "pickled").mkdir()
    assert checkpoint_folder(ModelSettings(name=str(tmp_path / "pickled"))) is None
    asked: list[str] = []

    def cached(name: str, file: str, **options: Any) -> str | None:
        assert options == {"_raise_exceptions_for_missing_entries": False, "revision": "v2", "cache_dir": "kept"}
        asked.append(file)
        path = sharded / file
        return str(path) if path.is_file() else None

    settings = ModelSettings(name="some/model", revision="v2", cache_dir="kept")
    monkeypatch.setattr(transformers.utils, "cached_file", cached)
    assert checkpoint_folder(settings) == sharded
    assert asked == ["model.safetensors.index.json", *sorted(p.name for p in sharded.glob("*.safetensors"))]
    (sharded / "model.safetensors.index.json").unlink()
    assert checkpoint_folder(settings) is None
    shutil.copy(next(sharded.glob("*.safetensors")), sharded / "model.safetensors")
    assert checkpoint_folder(settings) == sharded

    def fails(name: str, file: str, **options: Any) -> str:
        raise OSError("We couldn't connect")

    monkeypatch.setattr(transformers.utils, "cached_file", fails)
    with pytest.raises(ModelError, match="cannot load the model 'some/model': We couldn't connect"):
        checkpoint_folder(settings)


def test_a_base_that_is_gone(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("veneer.json", "base")):
        text = json.loads((adapter / name).read_text())
        (adapter / name).write_text(json.dumps({**text, key: "./gone"}))
    assert main(["merge", str(adapter), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "'./gone': there is no such folder" in error
    assert "names this base; give another with --model" in error
    assert not (tmp_path / "out").exists()


def test_a_structure_is_the_model_without_its_weights(sharded: Path) -> None:
    settings = ModelSettings(name=str(sharded), dtype="auto")
    found, whole = load_structure(settings), load_model(settings)
    assert all(param.is_meta for param in found.model.parameters())
    assert list(found.model.state_dict()) == list(whole.model.state_dict())
    assert found.model.generation_config.to_dict() == whole.model.generation_config.to_dict()
    with pytest.raises(ModelError, match="there is no such folder"):
        load_structure(ModelSettings(name="./nowhere"))
