"""The functions of peft.functional and of peft.tuners.tuners_utils, state dicts of the base, and conversion to LoRA."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.peft_door import nets
from torch import Tensor, nn

import veneer
import veneer.peft as ours
from veneer.method import VeneerError
from veneer.peft import functional
from veneer.peft.tuners.tuners_utils import check_target_module_exists, inspect_matched_modules, onload_layer

TARGETS = ["q_proj", "v_proj"]


def injected(*names: str, base: nn.Module | None = None) -> Any:
    model = nets.decoder() if base is None else base
    for name in names:
        functional.inject_adapter_in_model(ours.LoraConfig(r=2, target_modules=TARGETS), model, name)
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data.add_(torch.randn_like(param) * 0.2)
    return model


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**nets.inputs_for(nets.decoder())).logits


def trained(model: nn.Module) -> set[str]:
    return {name.rpartition(".weight")[0].rpartition(".")[2] for name, param in model.named_parameters()
            if param.requires_grad}


# -- models without a PeftModel -------------------------------------------------------------------------------
class TestFunctional:
    def test_set_adapter(self) -> None:
        model = injected("a", "b")
        assert trained(model) == {"b"}  # what came last, as in PEFT
        functional.set_adapter(model, "a")
        first = outputs(model)
        functional.set_adapter(model, "b")
        assert trained(model) == {"b"}
        assert not torch.allclose(outputs(model), first, atol=1e-3)
        functional.set_adapter(model, ["a", "b"], inference_mode=True)
        assert trained(model) == set()
        both = outputs(model)
        functional.set_adapter(model, "a")
        torch.testing.assert_close(outputs(model), first, rtol=0, atol=0)
        assert not torch.allclose(both, first, atol=1e-3)
        with pytest.raises(ValueError, match="Adapter c not found; there are: a, b"):
            functional.set_adapter(model, "c")

    def test_set_adapter_of_a_merged_model(self) -> None:
        model = injected("a", "b")
        veneer.merge(model, ["a"])
        with pytest.warns(UserWarning, match="Adapter cannot be set when the model is merged"):
            functional.set_adapter(model, "b")
        assert not any(status.merged_adapters for status in ours.get_layer_status(model))

    def test_delete_adapter(self) -> None:
        model = injected("a", "b")
        functional.set_adapter(model, ["a", "b"])
        assert functional.delete_adapter(model, "a", "lora_") == ["b"]
        assert {name for status in ours.get_layer_status(model) for name in status.available_adapters} == {"b"}
        with pytest.raises(ValueError, match="Adapter a does not exist; there are: b"):
            functional.delete_adapter(model, "a", "lora_")
        veneer.merge(model, ["b"])
        with pytest.raises(VeneerError, match="merged into the base weights"):
            functional.delete_adapter(model, "b", "lora_")
        veneer.unmerge(model)
        assert functional.delete_adapter(model, "b", "lora_") is None
        torch.testing.assert_close(outputs(model), outputs(nets.decoder()), rtol=0, atol=0)

    def test_deleting_the_active_one_makes_the_next_active(self) -> None:
        model = injected("a", "b")
        functional.set_adapter(model, "a")
        with pytest.warns(UserWarning, match="Adapter a was active which is now deleted. Setting active adapter to b"):
            assert functional.delete_adapter(model, "a", "lora_") == ["b"]
        assert not torch.allclose(outputs(model), outputs(nets.decoder()), atol=1e-3)

    def test_deleting_from_a_peft_model_takes_its_config_too(self) -> None:
        model: Any = ours.get_peft_model(nets.decoder(), ours.LoraConfig(r=2, target_modules=TARGETS))
        model.add_adapter("b", ours.LoraConfig(r=2, target_modules=TARGETS))
        functional.delete_adapter(model, "b", "lora_")
        assert list(model.peft_config) == ["default"]

    def test_set_requires_grad(self) -> None:
        model = injected("a", "b")
        functional.set_requires_grad(model, "a")
        assert trained(model) == {"a", "b"}
        functional.set_requires_grad(model, ["a", "b"], requires_grad=False)
        assert trained(model) == set()

    def test_cast_adapter_dtype(self) -> None:
        model = injected("a", "b").to(torch.bfloat16)
        functional.cast_adapter_dtype(model, "a", autocast_adapter_dtype=False)
        assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
        functional.cast_adapter_dtype(model, "a")
        for name, param in model.named_parameters():
            wide = name.endswith(".a.weight")
            assert param.dtype == (torch.float32 if wide else torch.bfloat16), name

    def test_state_dicts(self) -> None:
        model, other = injected("a"), injected("a")
        state = functional.get_peft_model_state_dict(model, adapter_name="a")
        assert "model.layers.0.self_attn.q_proj.lora_A.weight" in state  # of an injected model, by its own names
        assert list(model.peft_config) == ["a"]
        found = functional.set_peft_model_state_dict(other, state, adapter_name="a")
        assert (found.missing_keys, found.unexpected_keys) == ([], [])
        torch.testing.assert_close(outputs(other), outputs(model))


class TestTunersUtils:
    def test_check_target_module_exists_is_pefts(self) -> None:
        theirs = pytest.importorskip("peft")
        utils = pytest.importorskip("peft.tuners.tuners_utils")
        names = [name for name, _ in nets.decoder().named_modules() if name]
        for options in ({"target_modules": TARGETS}, {"target_modules": r".*\.[qk]_proj"},
                        {"target_modules": TARGETS, "exclude_modules": ["layers.1.self_attn.q_proj"]},
                        {"target_modules": TARGETS, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
                        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}):
            mine, other = ours.LoraConfig(**options), theirs.LoraConfig(**options)
            assert [check_target_module_exists(mine, name) for name in names] == \
                [bool(utils.check_target_module_exists(other, name)) for name in names]

    def test_inspect_matched_modules(self) -> None:
        model: Any = ours.get_peft_model(nets.decoder(), ours.LoraConfig(r=2, target_modules=["q_proj"]))
        found = inspect_matched_modules(model.base_model)
        assert found["matched"] == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
        assert "model.layers.0.self_attn.k_proj" in found["unmatched"]

    def test_onload_layer(self) -> None:
        with onload_layer(nn.Linear(2, 2)):
            pass


# -- the base's own state -------------------------------------------------------------------------------------
CONFIGS = {
    "lora": lambda: ours.LoraConfig(r=2, target_modules=[*TARGETS, "embed_tokens"], bias="all"),
    "whole": lambda: ours.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "rows": lambda: ours.LoraConfig(r=2, target_modules=TARGETS, trainable_token_indices=[1, 2]),
    "dora": lambda: ours.LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
    "vera": lambda: ours.VeraConfig(r=2, target_modules=["q_proj"]),
    "vblora": lambda: ours.VBLoRAConfig(r=2, vector_length=8, num_vectors=4, target_modules=TARGETS),
}


class TestBaseState:
    @pytest.mark.parametrize("config", CONFIGS)
    def test_it_is_that_of_the_bare_model(self, config: str) -> None:
        expected = nets.decoder().state_dict()
        model = ours.get_peft_model(nets.decoder(), CONFIGS[config]())
        found = ours.get_base_model_state_dict(model)
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)

    def test_setting_it_leaves_adapters_alone(self) -> None:
        model: Any = ours.get_peft_model(nets.decoder(), CONFIGS["whole"]())
        before = {name: param.clone() for name, param in model.named_parameters() if param.requires_grad}
        state = {key: value + 1 for key, value in nets.decoder().state_dict().items()}
        found = ours.set_base_model_state_dict(model, state)
        assert (found.missing_keys, found.unexpected_keys) == ([], [])
        now = ours.get_base_model_state_dict(model)
        assert all(torch.equal(now[key], state[key]) for key in state)
        assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in before.items())

    def test_strict_or_not(self) -> None:
        model: Any = ours.get_peft_model(nets.decoder(), CONFIGS["lora"]())
        state = {key: value + 1 for key, value in nets.decoder().state_dict().items()}
        gone = state.pop("lm_head.weight")
        state["more.weight"] = gone
        before = ours.get_base_model_state_dict(model)["model.norm.weight"].clone()
        with pytest.raises(RuntimeError, match=r"missing \['lm_head.weight'\]; unexpected \['more.weight'\]"):
            ours.set_base_model_state_dict(model, state)
        assert torch.equal(ours.get_base_model_state_dict(model)["model.norm.weight"], before)
        found = ours.set_base_model_state_dict(model, state, strict=False)
        assert (found.missing_keys, found.unexpected_keys) == (["lm_head.weight"], ["more.weight"])
        assert torch.equal(ours.get_base_model_state_dict(model)["model.norm.weight"], before + 1)


# -- conversion to LoRA ---------------------------------------------------------------------------------------
def others() -> dict[str, Any]:
    targets = {"target_modules": ["q_proj", "down_proj"]}
    return {"loha": ours.LoHaConfig(r=1, **targets), "lokr": ours.LoKrConfig(r=1, decompose_factor=4, **targets),
            "vera": ours.VeraConfig(r=2, **targets), "adalora": ours.AdaLoraConfig(total_step=5, init_r=3, target_r=2,
                                                                                   **targets),
            "randlora": ours.RandLoraConfig(r=4, **targets)}


def random(config: Any) -> Any:
    model = ours.get_peft_model(nets.decoder(), config)
    for param in model.parameters():
        if param.requires_grad:
            param.data.add_(torch.randn_like(param) * 0.3)
    return model.eval()


class TestConversion:
    @pytest.mark.parametrize("method", ["loha", "lokr", "vera", "adalora", "randlora"])
    def test_all_of_it_is_the_same_function(self, tmp_path: Path, method: str) -> None:
        model = random(others()[method])
        before = {name: value.clone() for name, value in model.state_dict().items()}
        ours.save_as_lora(tmp_path, model, 1.0)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        again = ours.PeftModel.from_pretrained(nets.decoder(), tmp_path)
        assert again.peft_config["default"].peft_type == ours.PeftType.LORA
        torch.testing.assert_close(outputs(again), outputs(model), rtol=1e-3, atol=1e-4)

    def test_peft_reads_it(self, tmp_path: Path) -> None:
        theirs = pytest.importorskip("peft")
        model = random(others()["loha"])
        ours.save_as_lora(tmp_path, model, 1.0)
        again = theirs.PeftModel.from_pretrained(nets.decoder(), tmp_path)
        torch.testing.assert_close(outputs(again), outputs(model), rtol=1e-3, atol=1e-4)

    def test_an_int_is_the_rank_and_the_best_of_it(self) -> None:
        model = random(others()["randlora"])
        config, state = ours.convert_to_lora(model, 3)
        assert (config.r, config.lora_alpha) == (3, 3)
        name = "base_model.model.model.layers.0.self_attn.q_proj"
        A, B = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
        assert (A.shape, B.shape) == ((3, 16), (16, 3))
        delta = model.get_submodule(name).get_delta_weight("default").detach()
        values = torch.linalg.svdvals(delta)
        assert float((delta - B @ A).norm()) == pytest.approx(float(values[3:].norm()), rel=1e-3)

    def test_a_float_is_a_share_of_the_squared_norm(self) -> None:
        model = random(others()["randlora"])
        config, state = ours.convert_to_lora(model, 0.8)
        ranks = {}
        for key, A in state.items():
            if key.endswith("lora_A.weight"):
                name = key.removesuffix(".lora_A.weight")
                square = torch.linalg.svdvals(model.get_submodule(name).get_delta_weight("default").detach())**2
                shares = square.cumsum(0) / square.sum()
                assert len(A) == int((shares < 0.8).sum()) + 1
                ranks[name] = len(A)
        assert len(set(ranks.values())) > 1
        assert config.rank_pattern

    def test_the_adapter_by_its_name_and_modules_trained_whole(self, tmp_path: Path) -> None:
        model = random(ours.LoHaConfig(r=1, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        model.add_adapter("other", ours.LoHaConfig(r=1, target_modules=["v_proj"]))
        config, state = ours.convert_to_lora(model, 2, adapter_name="other")
        assert config.target_modules == {"v_proj"}
        assert not any("lm_head" in key for key in state)
        ours.save_as_lora(tmp_path, model, 1.0)
        again = ours.PeftModel.from_pretrained(nets.decoder(), tmp_path)
        torch.testing.assert_close(outputs(again), outputs(model), rtol=1e-3, atol=1e-4)

    def test_task_and_base_are_taken_over(self) -> None:
        model = random(ours.LoHaConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model.peft_config["default"].base_model_name_or_path = "some/base"
        config, _ = ours.convert_to_lora(model, 2)
        assert (config.task_type, config.base_model_name_or_path) == ("CAUSAL_LM", "some/base")

    def test_a_model_with_an_injected_adapter(self) -> None:
        model = functional.inject_adapter_in_model(others()["lokr"], nets.decoder())
        _, state = ours.convert_to_lora(model, 2)
        assert len(state) == 2 * 6

    def test_what_is_refused(self) -> None:
        with pytest.raises(TypeError, match="Could not detect any layer that supports LoRA conversion"):
            ours.convert_to_lora(nets.decoder(), 2)
        model = random(others()["loha"])
        for rank, message in ((0, "rank of 0 doesn't make sense"), (1.5, "between 0 and 1 but got 1.5"),
                              (-2, "rank must be a whole number"), (17, r"rank 17 is larger than the weight shape")):
            with pytest.raises(ValueError, match=message):
                ours.convert_to_lora(model, rank)
        with pytest.raises(ValueError, match="no adapter named 'other'"):
            ours.convert_to_lora(model, 2, "other")

    def test_a_lora_is_told_so(self) -> None:
        model = random(ours.LoraConfig(r=4, target_modules=TARGETS))
        with pytest.warns(UserWarning, match="already a LoRA adapter"):
            config, _ = ours.convert_to_lora(model, 2)
        assert config.r == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours.convert_to_lora(copy.deepcopy(random(others()["lokr"])), 1)
