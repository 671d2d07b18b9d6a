"""Helpers, utilities and optimizers under PEFT's names."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.peft_door import nets
from torch import Tensor, nn

import veneer
import veneer.peft as ours
from veneer.method import VeneerError, VeneerWarning
from veneer.peft.helpers import (
    DoraCaching,
    check_if_peft_model,
    disable_input_dtype_casting,
    rescale_adapter_scale,
    update_forward_signature,
    update_generate_signature,
    update_signature,
)
from veneer.peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from veneer.peft.utils import infer_device, replace_lora_weights_loftq, shift_tokens_right, transpose

TARGETS = ["q_proj", "v_proj"]


def made(**options: Any) -> Any:
    model = ours.get_peft_model(nets.decoder(), ours.LoraConfig(**{"r": 2, "target_modules": TARGETS, **options}))
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data.add_(torch.randn_like(param) * 0.2)
    return model.eval()


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**nets.inputs_for(nets.decoder())).logits


# -- scales ---------------------------------------------------------------------------------------------------
class TestRescale:
    @pytest.mark.parametrize("dora", [False, True])
    def test_inside_the_change_is_multiplied(self, dora: bool) -> None:
        model = made(lora_alpha=4, use_dora=dora)
        before = outputs(model)
        half = made(lora_alpha=2, use_dora=dora)
        half.load_state_dict(model.state_dict())
        with rescale_adapter_scale(model, 0.5):
            torch.testing.assert_close(outputs(model), outputs(half))
        torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)

    def test_adalora(self) -> None:
        model, half = (ours.get_peft_model(nets.decoder(), ours.AdaLoraConfig(
            init_r=3, target_r=2, total_step=5, lora_alpha=alpha, target_modules=TARGETS)).eval() for alpha in (6, 3))
        for name, param in model.named_parameters():
            if "lora_E" in name:
                param.data.normal_()
        half.load_state_dict(model.state_dict())
        with rescale_adapter_scale(model, 0.5):
            torch.testing.assert_close(outputs(model), outputs(half))
        assert not torch.allclose(outputs(model), outputs(half), atol=1e-3)

    def test_zero_is_the_base_and_an_error_restores(self) -> None:
        model = made()
        before = outputs(model)
        with rescale_adapter_scale(model, 0):
            torch.testing.assert_close(outputs(model), outputs(nets.decoder()))
        with pytest.raises(RuntimeError, match="in between"), rescale_adapter_scale(model, 0):
            raise RuntimeError("in between")
        torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)

    def test_on_a_model_with_an_injected_adapter(self) -> None:
        model = ours.inject_adapter_in_model(ours.LoraConfig(r=2, target_modules=TARGETS), nets.decoder())
        layer: Any = model.model.layers[0].self_attn.q_proj
        with rescale_adapter_scale(model, 3):
            assert layer.scaling["default"] == 12.0
        assert layer.scaling["default"] == 4.0

    def test_refusals(self) -> None:
        with pytest.raises(TypeError, match="multiplier should be of type float, got <class 'str'>"), \
                rescale_adapter_scale(made(), "2"):  # type: ignore[arg-type]
            pass
        with pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"), \
                rescale_adapter_scale(nets.decoder(), 2):
            pass
        model = made()
        with pytest.raises(ValueError, match="must be finite"), rescale_adapter_scale(model, float("nan")):
            pass
        assert model.get_base_model().model.layers[2].self_attn.v_proj.scaling["default"] == 4.0


def test_contexts_that_change_nothing() -> None:
    model = made(use_dora=True)
    before = outputs(model)
    with disable_input_dtype_casting(model), disable_input_dtype_casting(model, active=False):
        torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)
    with DoraCaching():
        torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)
    switch = DoraCaching(False)
    switch(enabled=True)
    assert switch.enabled


# -- signatures -----------------------------------------------------------------------------------------------
class TestSignatures:
    def test_forward_and_generate_show_the_bases(self) -> None:
        model = made()
        base = model.get_base_model()
        assert list(inspect.signature(model.forward).parameters) == ["args", "kwargs"]
        update_signature(model)
        assert inspect.signature(model.forward) == inspect.signature(base.forward)
        assert inspect.signature(model.generate) == inspect.signature(base.generate)
        assert model.generate.__doc__ == base.generate.__doc__
        torch.testing.assert_close(outputs(model), outputs(made_like(model)), rtol=0, atol=0)

    @pytest.mark.parametrize(("update", "changed"), [
        (update_forward_signature, {"forward"}), (update_generate_signature, {"generate"}),
        (lambda m: update_signature(m, "forward"), {"forward"}),
        (lambda m: update_signature(m, "generate"), {"generate"})])
    def test_one_of_them(self, update: Any, changed: set[str]) -> None:
        model = made()
        update(model)
        assert {"forward", "generate"} & vars(model).keys() == changed

    def test_a_forward_with_arguments_of_its_own_stays(self) -> None:
        model = made(task_type="CAUSAL_LM")
        before = inspect.signature(model.forward)
        update_signature(model, "forward")
        assert inspect.signature(model.forward) == before

    def test_copies_run(self) -> None:
        model = made()
        update_signature(model)
        torch.testing.assert_close(outputs(copy.deepcopy(model)), outputs(model), rtol=0, atol=0)

    def test_another_method(self) -> None:
        with pytest.raises(ValueError, match=r"method train is not supported please choose one of \['forward'"):
            update_signature(made(), "train")


def made_like(model: Any, **options: Any) -> Any:
    other = made(**options)
    other.load_state_dict(model.state_dict())
    return other


def test_check_if_peft_model(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path / "lora")
    (tmp_path / "ia3").mkdir()
    (tmp_path / "ia3" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    (tmp_path / "none").mkdir()
    assert check_if_peft_model(tmp_path / "lora")
    assert check_if_peft_model(str(tmp_path / "ia3"))
    assert not check_if_peft_model(tmp_path / "none")


def quantised(model: nn.Module) -> nn.Module:
    veneer.quantize(model, "nf4")
    return model


# -- utilities ------------------------------------------------------------------------------------------------
class TestKbit:
    def test_a_quantised_model_is_frozen_with_norms_in_fp32_and_checkpointed(self) -> None:
        model: Any = quantised(nets.decoder().to(torch.bfloat16))
        assert ours.prepare_model_for_kbit_training(model) is model
        assert not any(param.requires_grad for param in model.parameters())
        assert model.model.norm.weight.dtype == torch.float32
        assert model.is_activation_checkpointing
        assert model.model.layers[0].gradient_checkpointing
        assert model.model.layers[0]._gradient_checkpointing_func.keywords["use_reentrant"] is False

    def test_options(self) -> None:
        model: Any = quantised(nets.decoder())
        ours.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        assert not model.is_activation_checkpointing
        ours.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})
        assert model.model.layers[0]._gradient_checkpointing_func.keywords["use_reentrant"] is True

    def test_a_dense_model_is_not_checkpointed_as_in_peft(self) -> None:
        model: Any = ours.prepare_model_for_kbit_training(nets.decoder())
        assert not model.is_activation_checkpointing
        assert not any(param.requires_grad for param in model.parameters())

    def test_a_quantised_model_without_checkpointing(self) -> None:
        with pytest.raises(VeneerError, match="has no gradient checkpointing of its own"):
            ours.prepare_model_for_kbit_training(quantised(nn.Sequential(nn.Linear(64, 64))))


class TestCast:
    def test_frozen_and_trained(self) -> None:
        model = made(modules_to_save=["lm_head"])
        ids = {name: id(param) for name, param in model.named_parameters()}
        ours.cast_mixed_precision_params(model, torch.bfloat16)
        for name, param in model.named_parameters():
            assert param.dtype == (torch.float32 if param.requires_grad else torch.bfloat16), name
            assert id(param) == ids[name]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert outputs(model).isfinite().all()

    def test_packed_weights_stay(self) -> None:
        model = quantised(nets.decoder())
        before = outputs(model)
        packed = {name: p.dtype for name, p in model.named_parameters() if not p.is_floating_point()}
        ours.cast_mixed_precision_params(model, torch.bfloat16)
        assert {name: p.dtype for name, p in model.named_parameters() if name in packed} == packed
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(outputs(model).float(), before, rtol=0.1, atol=0.05)

    def test_another_dtype(self) -> None:
        with pytest.raises(ValueError, match=r"must be torch.float16 or torch.bfloat16, got torch.int8"):
            ours.cast_mixed_precision_params(made(), torch.int8)


def test_small_functions_are_pefts() -> None:
    theirs = pytest.importorskip("peft.utils.other")
    ids = torch.tensor([[5, 6, -100], [7, -100, -100]])
    assert torch.equal(shift_tokens_right(ids, 0, 2), theirs.shift_tokens_right(ids, 0, 2))
    with pytest.raises(ValueError, match="pad_token_id"):
        shift_tokens_right(ids, None, 2)  # type: ignore[arg-type]
    weight = nn.Parameter(torch.randn(2, 3))
    for flag in (True, False):
        mine, other = transpose(weight, flag), theirs.transpose(weight, flag)
        assert torch.equal(mine, other)
        assert type(mine) is type(other)
    assert torch.equal(transpose(weight.detach(), True), weight.T)
    assert infer_device() == theirs.infer_device()


class TestLoftQ:
    def quantised(self) -> tuple[Any, dict[str, Tensor]]:
        base = nets.decoder()
        originals = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        veneer.quantize(base, "nf4")
        return ours.get_peft_model(base, ours.LoraConfig(r=4, target_modules=TARGETS)), originals

    def test_it_comes_nearer_to_the_originals(self, tmp_path: Path) -> None:
        model, _ = self.quantised()
        original: Any = nets.decoder()
        original.save_pretrained(tmp_path)
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        wanted = original.model.layers[0].self_attn.q_proj.weight
        held = veneer.storage.packed_storage(layer).read(layer)
        report = replace_lora_weights_loftq(model, str(tmp_path))
        assert report.error_after < report.error_before
        assert (wanted - held - layer.get_delta_weight("default")).norm() < (wanted - held).norm()

    def test_the_callback_is_given_the_peft_model_and_decides(self, tmp_path: Path) -> None:
        model, _ = self.quantised()
        nets.decoder().save_pretrained(tmp_path)  # type: ignore[operator]
        seen = []

        def callback(given: Any, name: str) -> bool:
            seen.append((given is model, name))
            return name.endswith("q_proj")

        report = replace_lora_weights_loftq(model, tmp_path, callback=callback)
        assert all(same for same, _ in seen)
        assert "model.layers.0.self_attn.q_proj" in [name for _, name in seen]
        assert len(report.replaced) == 3 < len(seen)
        assert not model.get_base_model().model.layers[0].self_attn.v_proj.lora_B["default"].weight.any()

    def test_where_the_model_was_loaded_from(self, tmp_path: Path) -> None:
        model, _ = self.quantised()
        nets.decoder().save_pretrained(tmp_path)  # type: ignore[operator]
        model.get_base_model().config._name_or_path = str(tmp_path)
        assert replace_lora_weights_loftq(model).replaced
        model.get_base_model().config._name_or_path = ""
        with pytest.raises(ValueError, match="does not say where it was loaded from"):
            replace_lora_weights_loftq(model)
        model.get_base_model().config._name_or_path = "nobody/has-this"
        with pytest.raises(VeneerError, match="the weights of 'nobody/has-this' are not on this machine"):
            replace_lora_weights_loftq(model)
        with pytest.raises(VeneerError, match="no adapter named 'other'"):
            replace_lora_weights_loftq(model, tmp_path, "other")


# -- optimizers -----------------------------------------------------------------------------------------------
class TestLoraPlus:
    def test_rates_of_both_sides_and_of_embeddings(self) -> None:
        model = made(target_modules=["q_proj", "embed_tokens"])
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4.0,
                                              betas=(0.8, 0.9), loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-5)
        rates = {id(param): group["lr"] for group in optimizer.param_groups for param in group["params"]}
        for name, param in model.named_parameters():
            expected = 1e-5 if "embedding" in name else 4e-3 if "lora_B" in name else 1e-3
            if param.requires_grad:
                assert rates.pop(id(param)) == pytest.approx(expected), name
        assert not rates
        assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}

    def test_defaults_are_pefts(self) -> None:
        model = made(target_modules=["q_proj", "embed_tokens"])
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=2.0)
        assert {group["lr"] for group in optimizer.param_groups} == {1e-6, 1e-3, 2e-3}
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}

    def test_embeddings_stay_in_32_bits(self) -> None:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        model = made(target_modules=["q_proj", "embed_tokens"])
        create_loraplus_optimizer(model, bitsandbytes.optim.AdamW8bit, lr=1e-3, loraplus_lr_ratio=2.0)
        settings = bitsandbytes.optim.GlobalOptimManager.get_instance().pid2config
        table = model.get_base_model().model.embed_tokens
        assert settings[id(table.lora_embedding_A["default"])] == {"optim_bits": 32}
        assert id(model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight) not in settings


class TestLoraFA:
    def test_a_is_frozen_and_b_sees_the_projected_gradient(self) -> None:
        model = made(lora_alpha=6)
        twin = made_like(model, lora_alpha=6)
        optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=6, lr=1e-2, weight_decay=0.01)
        own = veneer.optim.lora_fa(twin.get_base_model(), lr=1e-2, weight_decay=0.01, eps=1e-6)
        for each, step in ((model, optimizer), (twin, own)):
            inputs = nets.inputs_for(nets.decoder())
            each(**inputs, labels=inputs["input_ids"]).loss.backward()
            step.step()
        for (name, param), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            torch.testing.assert_close(param, other, rtol=0, atol=0)
            assert "lora_A" not in name or not param.requires_grad
        assert {group["lr"] for group in optimizer.param_groups} == {1e-2}
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.01}

    def test_r_and_alpha_that_are_not_the_adapters(self) -> None:
        with pytest.warns(VeneerWarning, match="r=2, lora_alpha=8; these count"):
            create_lorafa_optimizer(made(), r=16, lora_alpha=8, lr=1e-3)
        with pytest.warns(VeneerWarning, match="r=2, lora_alpha=8; these count"):
            create_lorafa_optimizer(made(), r=2, lora_alpha=9, lr=1e-3)

    def test_use_rslora_must_agree(self) -> None:
        create_lorafa_optimizer(made(use_rslora=True), 2, 8, 1e-3, use_rslora=True)
        for rslora in (True, False):
            with pytest.raises(ValueError, match=f"`use_rslora={not rslora}` was passed"):
                create_lorafa_optimizer(made(use_rslora=rslora), 2, 8, 1e-3, use_rslora=not rslora)

    def test_adapters_without_a_pair(self) -> None:
        with pytest.raises(VeneerError, match="no pair"):
            create_lorafa_optimizer(made(modules_to_save=["lm_head"]), 2, 8, 1e-3)
