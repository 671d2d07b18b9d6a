"""Directories as NeMo writes them, read and written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from veneer.attached import adapter_names
from veneer.inspect.summary import adapters
from veneer.method import VeneerError
from veneer.nemo import (
    LinearLoRA,
    PeftConfig,
    TritonLinearLoRA,
    apply_lora_to_linear_modules,
    load_adapter,
    read_config,
    save_adapter,
)

from .nets import GOLDEN, META, Experts, Toy, ToyForCausalLM, golden_llama

CKPT = GOLDEN / "ckpt"
CONFIG = PeftConfig(**META["llama"]["peft"])


def scattered(model, config, **options):
    apply_lora_to_linear_modules(model, config, **options)
    with torch.no_grad():
        for param in veneer.trainable(model):
            param.add_(torch.randn(param.shape).mul_(0.1).to(param.dtype))
    return model.eval()


def _as_nemo_would(path):
    """Take away what Veneer adds to NeMo's files."""
    (path / "veneer.json").unlink()
    tensors = load_file(path / "adapter_model.safetensors")
    save_file(tensors, path / "adapter_model.safetensors")


def test_what_nemo_wrote_is_read_and_computes_the_same():
    model, data = golden_llama()
    config = load_adapter(model, CKPT)
    assert config == CONFIG == read_config(CKPT)
    torch.testing.assert_close(model(data["input_ids"]).logits, data["logits"], rtol=1e-5, atol=1e-6)
    assert isinstance(model.model.layers[0].self_attn.q_proj, LinearLoRA)
    assert len(veneer.trainable(model)) == len(META["llama"]["trainable"])


def test_what_is_written_is_what_nemo_writes(tmp_path):
    model, _ = golden_llama()
    load_adapter(model, CKPT)
    report = save_adapter(model, CONFIG, tmp_path)
    assert report.files == ("adapter_model.safetensors", "adapter_config.json", "automodel_peft_config.json",
                            "veneer.json")
    for name in ("adapter_config.json", "automodel_peft_config.json"):
        assert (tmp_path / name).read_text() == (CKPT / name).read_text()
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, CKPT))
    assert sorted(ours) == META["ckpt_keys"] == sorted(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_peft_loads_what_is_written(tmp_path):
    peft = pytest.importorskip("peft")
    model, data = golden_llama()
    save_adapter(scattered(model, CONFIG), CONFIG, tmp_path)
    other = peft.PeftModel.from_pretrained(golden_llama()[0], tmp_path)
    torch.testing.assert_close(other(data["input_ids"]).logits, model(data["input_ids"]).logits)


@pytest.mark.parametrize("options", [
    {}, {"dropout": 0.25, "dropout_position": "pre"}, {"dropout": 0.25}, {"lora_dtype": torch.bfloat16},
    {"lora_A_init": "uniform", "use_triton": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("bare", [False, True], ids=["whole", "without Veneer's own"])
def test_a_round_trip_keeps_values_and_settings(tmp_path, options, bare):
    config = PeftConfig(target_modules=["*_proj", "fc"], dim=3, alpha=5, **options)
    model, ids = scattered(Toy(), config), torch.arange(6).view(2, 3)
    save_adapter(model, config, tmp_path)
    if bare:
        _as_nemo_would(tmp_path)
    other = Toy().eval()
    found = load_adapter(other, tmp_path)
    expected = {**config.to_dict(), **({"lora_dtype": "torch.bfloat16"} if "lora_dtype" in options else {})}
    assert found.to_dict() == expected
    assert torch.equal(other(ids), model(ids))
    mine, theirs = (adapters(each)["default"].weights for each in (model, other))
    assert {name: (a.method, a.dropout, a.dropout_on) for name, a in theirs.items()} == {
        name: (a.method, a.dropout, a.dropout_on) for name, a in mine.items()}
    assert isinstance(other.fc, TritonLinearLoRA) is config.use_triton
    assert all(param.requires_grad for param in veneer.trainable(other))


def test_an_adapter_that_is_there_gets_the_values(tmp_path):
    config = PeftConfig(target_modules=["fc"], dim=2)
    save_adapter(scattered(Toy(), config), config, tmp_path)
    other = scattered(Toy(), config)
    param = other.fc.lora_A.weight
    load_adapter(other, tmp_path)
    assert other.fc.lora_A.weight is param
    assert torch.equal(param, load_file(tmp_path / "adapter_model.safetensors")["base_model.model.fc.lora_A.weight"])


def test_16_bit_tensors_stay_what_they_are_where_nothing_says_a_dtype(tmp_path):
    config = PeftConfig(target_modules=["fc"], dim=2)
    model = scattered(Toy().to(torch.bfloat16), config)
    save_adapter(model, config, tmp_path)
    _as_nemo_would(tmp_path)
    for dtype in (torch.bfloat16, torch.float32):
        other = Toy().to(dtype)
        assert load_adapter(other, tmp_path).lora_dtype is None
        assert other.fc.lora_A.weight.dtype == torch.bfloat16
        assert torch.equal(other.fc.lora_A.weight, model.fc.lora_A.weight)


@pytest.mark.parametrize("bare", [False, True], ids=["whole", "without Veneer's own"])
def test_experts(tmp_path, bare):
    config = PeftConfig(target_modules=["experts", "router"], dim=4, moe_rank_scaling=True)
    model = scattered(Experts(), config)
    save_adapter(model, config, tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["target_modules"] == ["router"]
    assert said["target_parameters"]
    assert json.loads((tmp_path / "automodel_peft_config.json").read_text())["moe_rank_scaling"] is True
    if bare:
        _as_nemo_would(tmp_path)
    other = Experts()
    load_adapter(other, tmp_path)
    assert isinstance(other.router, LinearLoRA)
    for name, adapter in adapters(model)["default"].weights.items():
        assert torch.equal(adapters(other)["default"].weights[name].delta(), adapter.delta())


def test_later_settings_are_written_where_they_are_not_the_default(tmp_path):
    config = PeftConfig(target_modules=["fc"], use_dora=True, use_memory_efficient_lora=False)
    save_adapter(scattered(Toy(), config), config, tmp_path)
    said = json.loads((tmp_path / "automodel_peft_config.json").read_text())
    assert (said["use_dora"], said["use_memory_efficient_lora"]) == (True, False)
    assert "moe_rank_scaling" not in said
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True


def test_a_file_for_another_model_is_refused_and_the_model_stays(tmp_path):
    shutil.copytree(CKPT, tmp_path / "ckpt")
    model = ToyForCausalLM()
    before = (set(model.state_dict()), {n: p.requires_grad for n, p in model.named_parameters()})
    with pytest.raises(VeneerError, match=r"no module 'model.layers.0.mlp.down_proj' here"):
        load_adapter(model, tmp_path / "ckpt")
    assert (set(model.state_dict()), {n: p.requires_grad for n, p in model.named_parameters()}) == before
    assert not adapter_names(model)


def test_a_tensor_that_is_missing_is_named_and_the_model_stays(tmp_path):
    shutil.copytree(CKPT, tmp_path / "ckpt")
    file = tmp_path / "ckpt" / "adapter_model.safetensors"
    tensors = load_file(CKPT / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    file.unlink()
    save_file(tensors, file)
    model, _ = golden_llama()
    with pytest.raises(VeneerError, match=r"missing: B of 'model.layers.0.mlp.up_proj'"):
        load_adapter(model, tmp_path / "ckpt")
    assert not adapter_names(model)
    assert type(model.lm_head) is nn.Linear


def test_without_nemos_own_settings_pefts_are_taken(tmp_path):
    config = PeftConfig(target_modules=["fc"], dim=2, alpha=6)
    save_adapter(scattered(Toy(), config), config, tmp_path)
    (tmp_path / "automodel_peft_config.json").unlink()
    found = read_config(tmp_path)
    assert (found.target_modules, found.dim, found.alpha, found.dropout_position) == (["fc"], 2, 6, "pre")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(VeneerError, match=r"there is no adapter_config\.json in"):
        read_config(tmp_path)


def test_what_these_files_cannot_hold_is_refused(tmp_path):
    mixed = Toy()
    veneer.attach(mixed, {"fc": veneer.LoRA(), "xq_proj": veneer.LoHa(rank=2)}, name="mixed")
    with pytest.raises(VeneerError, match="save: these files cannot hold the adapter 'mixed': "):
        save_adapter(mixed, PeftConfig(target_modules=["fc"]), tmp_path, name="mixed")
    assert not list(tmp_path.iterdir())
