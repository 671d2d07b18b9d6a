"""Hot-swapping: the outputs of the other adapter, in the same parameters, and no second compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.peft_door import nets
from torch import Tensor, nn

import veneer.peft as ours
from veneer.method import VeneerError
from veneer.peft.utils.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

TARGETS = ["q_proj", "v_proj", "down_proj"]


def saved(path: Path, seed: int, **options: Any) -> Tensor:
    """An adapter with random values in a folder; returns the outputs of the model with it."""
    torch.manual_seed(seed)
    config = ours.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **options})
    model: Any = ours.get_peft_model(nets.decoder(), config)
    for param in model.parameters():
        if param.requires_grad:
            param.data.add_(torch.randn_like(param) * 0.3)
    model.save_pretrained(path)
    return outputs(model)


def outputs(model: nn.Module) -> Tensor:
    bare = getattr(model, "_orig_mod", model)
    base = bare.get_base_model() if isinstance(bare, ours.PeftModel) else bare
    with torch.no_grad():
        return model(**nets.inputs_for(base)).logits


def loaded(path: Path) -> Any:
    return ours.PeftModel.from_pretrained(nets.decoder(), path)


def trained(model: nn.Module) -> dict[str, int]:
    return {name: id(param) for name, param in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("options", [
    {}, {"r": 2}, {"lora_alpha": 20}, {"r": 3, "lora_alpha": 1}, {"rank_pattern": {"q_proj": 1}},
    {"target_modules": ["q_proj"]}], ids=str)
def test_outputs_are_those_of_loading_the_other_in_the_same_parameters(tmp_path: Path, options: dict) -> None:
    first = saved(tmp_path / "first", 1)
    second = saved(tmp_path / "second", 2, **options)
    model = loaded(tmp_path / "first")
    before = trained(model)
    assert not torch.allclose(first, second, atol=1e-3)
    hotswap_adapter(model, tmp_path / "second", "default")
    torch.testing.assert_close(outputs(model), second, rtol=1e-4, atol=1e-5)
    assert trained(model) == before
    hotswap_adapter(model, tmp_path / "first", "default")
    torch.testing.assert_close(outputs(model), first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True},
                                     {"target_modules": ["q_proj", "embed_tokens"]}], ids=str)
def test_what_else_a_lora_may_have(tmp_path: Path, options: dict) -> None:
    saved(tmp_path / "first", 1, **options)
    second = saved(tmp_path / "second", 2, lora_alpha=9, r=3, **options)
    model = loaded(tmp_path / "first")
    outputs(model)  # so that a norm of DoRA's is kept
    hotswap_adapter(model, tmp_path / "second", "default")
    torch.testing.assert_close(outputs(model), second, rtol=1e-4, atol=1e-5)


def test_layers_without_dora_in_the_new_one_are_as_the_base(tmp_path: Path) -> None:
    saved(tmp_path / "first", 1, use_dora=True)
    second = saved(tmp_path / "second", 2, use_dora=True, target_modules=["q_proj"])
    model = loaded(tmp_path / "first")
    hotswap_adapter(model, tmp_path / "second", "default")
    torch.testing.assert_close(outputs(model), second, rtol=1e-4, atol=1e-5)


def test_load_adapter_with_hotswap(tmp_path: Path) -> None:
    saved(tmp_path / "first", 1)
    second = saved(tmp_path / "second", 2)
    model = loaded(tmp_path / "first")
    model.load_adapter(tmp_path / "second", "default", hotswap=True)
    torch.testing.assert_close(outputs(model), second, rtol=1e-4, atol=1e-5)


# -- prepared and compiled ------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model_is_not_compiled_again(tmp_path: Path, how: str) -> None:
    first = saved(tmp_path / "first", 1, r=2)
    second = saved(tmp_path / "second", 2, r=5, lora_alpha=11)
    third = saved(tmp_path / "third", 3, r=1, rank_pattern={"v_proj": 3}, target_modules=["v_proj", "down_proj"])
    model = loaded(tmp_path / "first")
    prepare_model_for_compiled_hotswap(model, target_rank=5, config=model.peft_config)
    assert model.peft_config["default"].r == 5
    torch._dynamo.reset()
    if how == "wrapped":
        model = torch.compile(model, backend="eager", dynamic=False)
    else:
        model.compile(backend="eager", dynamic=False)
    torch.testing.assert_close(outputs(model), first, rtol=1e-4, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name, expected in (("second", second), ("third", third), ("first", first)):
            hotswap_adapter(model, tmp_path / name, "default")
            torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)


def test_a_scale_that_changes_would_compile_it_again(tmp_path: Path) -> None:
    """Why another scale is folded into B; and the test above would see it."""
    saved(tmp_path / "first", 1)
    model = loaded(tmp_path / "first")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", dynamic=False)
    outputs(compiled)
    model.get_base_model().model.layers[1].self_attn.v_proj.scaling["default"] = 0.5
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        outputs(compiled)


def test_padding_changes_no_output_and_saves_as_it_is(tmp_path: Path) -> None:
    for number, options in enumerate(({}, {"use_dora": True}, {"use_rslora": True}, {"lora_bias": True})):
        expected = saved(tmp_path / f"a{number}", 1, r=2, rank_pattern={"q_proj": 3}, **options)
        model = loaded(tmp_path / f"a{number}")
        frozen = {name: param.requires_grad for name, param in model.named_parameters()}
        prepare_model_for_compiled_hotswap(model, target_rank=6)
        assert {name: param.requires_grad for name, param in model.named_parameters()} == frozen
        assert {param.shape[0] for name, param in model.named_parameters() if "lora_A" in name} == {6}
        torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path / f"b{number}")
        torch.testing.assert_close(outputs(loaded(tmp_path / f"b{number}")), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_subtracts_its_start_becomes_plain(tmp_path: Path) -> None:
    second = saved(tmp_path / "second", 2)
    model: Any = ours.get_peft_model(nets.decoder(), ours.LoraConfig(r=2, target_modules=TARGETS,
                                                                    init_lora_weights="pissa"))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            param.data.add_(0.1)
    expected = outputs(model)
    with pytest.raises(VeneerError, match=r"subtracts the pair .* plain one of rank 4"):
        hotswap_adapter(model, tmp_path / "second", "default")
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)
    hotswap_adapter(model, tmp_path / "second", "default")
    torch.testing.assert_close(outputs(model), second, rtol=1e-4, atol=1e-5)


def test_a_prepared_adapter_still_trains(tmp_path: Path) -> None:
    model: Any = ours.get_peft_model(nets.decoder(), ours.LoraConfig(r=2, target_modules=TARGETS))
    prepare_model_for_compiled_hotswap(model, target_rank=3, config=ours.LoraConfig(r=2))
    inputs = nets.inputs_for(model.get_base_model())
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(param.grad is not None for name, param in model.named_parameters() if "lora_B" in name)


# -- state dicts ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("named", [True, False])
def test_state_dicts_with_the_adapters_name_or_without(tmp_path: Path, named: bool) -> None:
    saved(tmp_path / "first", 1)
    second = saved(tmp_path / "second", 2)
    model, other = loaded(tmp_path / "first"), loaded(tmp_path / "second")
    state = ours.get_peft_model_state_dict(other)
    if named:
        state = {key.replace(".weight", ".default.weight"): tensor for key, tensor in state.items()}
    hotswap_adapter_from_state_dict(model, state, "default", other.peft_config["default"])
    torch.testing.assert_close(outputs(model), second, rtol=1e-4, atol=1e-5)


def test_a_model_with_an_injected_adapter(tmp_path: Path) -> None:
    second = saved(tmp_path / "second", 2)
    config = ours.LoraConfig(r=4, target_modules=TARGETS)
    model = ours.inject_adapter_in_model(config, nets.decoder())
    hotswap_adapter(model, tmp_path / "second", "default")
    torch.testing.assert_close(outputs(model), second, rtol=1e-4, atol=1e-5)


# -- errors ---------------------------------------------------------------------------------------------------
def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    first = saved(tmp_path / "first", 1)
    model = loaded(tmp_path / "first")
    for name, options, error, message in (
            ("rank", {"r": 6}, ValueError, r"rank 4 vs 6.*prepare_model_for_compiled_hotswap\(model, target_rank=6\)"),
            ("layers", {"target_modules": ["q_proj", "o_proj"]}, RuntimeError, r"o_proj' is in the new adapter"),
            ("dora", {"use_dora": True}, ValueError, "for use_dora, False != True"),
            ("rslora", {"use_rslora": True}, ValueError, "for use_rslora, False != True"),
            ("dropout", {"lora_dropout": 0.1}, ValueError, "for lora_dropout, 0.0 != 0.1"),
            ("alphas", {"alpha_pattern": {"q_proj": 3}}, ValueError, "for alpha_pattern"),
            ("bias", {"lora_bias": True}, RuntimeError, "has a bias")):
        saved(tmp_path / name, 2, **options)
        with pytest.raises(error, match=message):
            hotswap_adapter(model, tmp_path / name, "default")
        torch.testing.assert_close(outputs(model), first, rtol=0, atol=0)
    with pytest.raises(ValueError, match="Adapter other does not exist; there are: default"):
        hotswap_adapter(model, tmp_path / "first", "other")
    with pytest.raises(RuntimeError, match="unexpected keys found"):
        hotswap_adapter_from_state_dict(model, {"a.b": torch.ones(1)}, "default", model.peft_config["default"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="currently merged into the base weights"):
        hotswap_adapter(model, tmp_path / "first", "default")


def test_dora_in_the_place_of_lora_on_a_model_without_a_config(tmp_path: Path) -> None:
    saved(tmp_path / "dora", 2, use_dora=True)
    model = ours.inject_adapter_in_model(ours.LoraConfig(r=4, target_modules=TARGETS), nets.decoder())
    with pytest.raises(RuntimeError, match="would become DoRA"):
        hotswap_adapter(model, tmp_path / "dora", "default")


def test_preparing_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No adapter layers found on the model"):
        prepare_model_for_compiled_hotswap(nets.decoder(), target_rank=4)
    saved(tmp_path / "first", 1)
    model = loaded(tmp_path / "first")
    with pytest.raises(ValueError, match=r"its rank is larger \(4\)"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"\*before\* compiling the model"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.raises(ValueError, match="should be one of 'error', 'warn', or 'ignore'"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="no")
    with pytest.warns(UserWarning, match="already compiled"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, target_rank=9, check_compiled="ignore")


def test_configs_of_other_methods() -> None:
    lora = ours.LoraConfig(target_modules=TARGETS)
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and LOHA"):
        check_hotswap_configs_compatible(lora, ours.LoHaConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but LOHA was passed"):
        check_hotswap_configs_compatible(*[ours.LoHaConfig(target_modules=TARGETS)] * 2)
    check_hotswap_configs_compatible(lora, ours.LoraConfig(r=2, lora_alpha=3, target_modules=["a"]))
