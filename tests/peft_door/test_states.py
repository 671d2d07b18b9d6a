"""Which adapters are active, trainable, merged, switched off, in the order in which scripts do such things."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.peft_door import nets
from torch import Tensor, nn

import veneer
from veneer.peft import (
    LoHaConfig,
    LoraConfig,
    PeftModel,
    VBLoRAConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)


def config(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **more})


def output(model: nn.Module, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**nets.inputs_for(model), **more).logits  # type: ignore[operator]


def shaken(model: nn.Module, name: str = "default") -> None:
    with torch.no_grad():
        for i, (key, param) in enumerate(model.named_parameters()):
            if f".{name}" in key:
                param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(i)) * 0.1)


def trained(model: nn.Module) -> set[str]:
    return {part for name, param in model.named_parameters() if param.requires_grad
            for part in name.split(".") if part in ("default", "a", "b", "ref")}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
        yield


@pytest.fixture
def bare() -> Tensor:
    return output(nets.decoder())


# -- a base that has adapters already -----------------------------------------------------------------------
def test_a_second_model_on_a_base_makes_its_own_adapter_active(tmp_path: Path, bare: Tensor) -> None:
    base = nets.decoder()
    first = get_peft_model(base, config(), "a")
    shaken(first, "a")
    second = get_peft_model(base, config(), "b")
    assert second.active_adapters == ["b"]
    assert trained(base) == {"b"}
    assert torch.equal(output(second), bare)
    shaken(second, "b")
    second.save_pretrained(tmp_path)
    other = nets.decoder()
    shaken(get_peft_model(other, config(), "a"), "a")
    loaded = PeftModel.from_pretrained(other, tmp_path / "b", "b")
    assert loaded.active_adapters == ["b"]
    assert torch.equal(output(loaded), output(second))
    inject_adapter_in_model(config(), other, "ref")
    assert trained(other) == {"ref"}


def test_an_adapter_of_the_same_name_makes_place(bare: Tensor) -> None:
    base = nets.decoder()
    first = get_peft_model(base, config(r=8))
    shaken(first)
    again = get_peft_model(first, config(r=2))  # as a notebook's cell that is run twice
    assert again.get_base_model() is base
    assert torch.equal(output(again), bare)
    assert base.model.layers[0].self_attn.q_proj.r == {"default": 2}
    with pytest.raises(ValueError, match="has an adapter 'default' already, of another PeftModel"):
        PeftModel.from_pretrained(base, _saved(config()))


def _saved(made: LoraConfig, _kept: list[Any] = []) -> str:  # noqa: B006
    import tempfile

    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    get_peft_model(nets.decoder(), made).save_pretrained(folder.name)
    return folder.name


# -- who is trained -----------------------------------------------------------------------------------------
def test_a_frozen_adapter_beside_a_trained_one(bare: Tensor) -> None:
    model = get_peft_model(nets.decoder(), config(), "a")
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["a"].weight.requires_grad_(False)
    before = {name for name, param in model.named_parameters() if param.requires_grad}
    model.load_adapter(_saved(config()), "ref")  # the reference policy of DPO
    model.add_adapter("b", config(inference_mode=True))
    assert {name for name, param in model.named_parameters() if param.requires_grad} == before
    model.delete_adapter("b")
    model.add_weighted_adapter(["a", "ref"], [0.5, 0.5], "b", "linear")
    assert {name for name, param in model.named_parameters() if param.requires_grad} == before


def test_deleting_an_inactive_adapter_trains_nothing() -> None:
    model = PeftModel.from_pretrained(nets.decoder(), _saved(config()))
    model.load_adapter(_saved(config()), "b")
    model.delete_adapter("b")
    assert not any(param.requires_grad for param in model.parameters())


def test_weights_of_an_adapter_that_is_named_twice_add_up() -> None:
    model = get_peft_model(nets.decoder(), config())
    shaken(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    want = layer.get_delta_weight("default")
    model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "b", "linear")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.allclose(layer.get_delta_weight("b"), want, atol=1e-6)


# -- switched off, merged -----------------------------------------------------------------------------------
def test_switching_off_while_merged_gives_the_base(bare: Tensor) -> None:
    model = get_peft_model(nets.decoder(), config())
    shaken(model)
    adapted = output(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"), model.disable_adapter():
        assert torch.equal(output(model), bare)
    assert torch.equal(output(model), adapted)


def test_ways_to_switch_off_go_into_each_other(bare: Tensor) -> None:
    model = get_peft_model(nets.decoder(), config())
    shaken(model)
    adapted = output(model)
    with veneer.disabled(model.get_base_model()), model.disable_adapter(), model.disable_adapter():
        assert torch.equal(output(model), bare)
    assert torch.equal(output(model), adapted)
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(output(model), bare)
    model.add_adapter("b", config())
    assert torch.equal(output(model), bare)
    model.base_model.enable_adapter_layers()
    assert torch.equal(output(model), adapted)


@pytest.mark.parametrize("names", [["nobody"], ["b"]])
def test_a_merge_that_fails_leaves_what_was_merged(names: list[str]) -> None:
    model = get_peft_model(nets.decoder(), config())
    shaken(model)
    model.add_adapter("b", config())
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.q_proj.lora_A["b"].weight.fill_(torch.nan)
    model.merge_adapter()
    merged = output(model)
    for call in (model.merge_adapter, lambda names: model.merge_and_unload(adapter_names=names)):
        with pytest.raises(ValueError, match=r"no adapter named 'nobody'|would hold NaN"):
            call(names)
        assert model.base_model._merged() == ["default"]
        assert torch.equal(output(model), merged)


def test_copies_of_one_module_are_not_merged_together() -> None:
    model = get_peft_model(nets.decoder(), config(modules_to_save=["lm_head"]))
    model.add_adapter("b", config(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="'default' and 'b' each have a trained copy of 'lm_head'"):
        model.merge_and_unload(adapter_names=["default", "b"])
    assert list(model.peft_config) == ["default", "b"]


def test_without_an_adapter_there_is_no_config() -> None:
    model = get_peft_model(nets.decoder(), config())
    model.unload()
    with pytest.raises(ValueError, match="has no adapter any more"):
        _ = model.active_peft_config


# -- state dicts ----------------------------------------------------------------------------------------------
def test_nothing_is_loaded_where_something_is_wrong() -> None:
    model = get_peft_model(nets.decoder(), config())
    before = {name: param.clone() for name, param in model.named_parameters()}
    state = {key: torch.ones_like(value) for key, value in get_peft_model_state_dict(model).items()}
    last = list(state)[-1]
    with pytest.raises(ValueError, match="wrong shape"):
        set_peft_model_state_dict(model, {**state, last: torch.ones(3, 3)})
    assert all(torch.equal(before[name], param) for name, param in model.named_parameters())
    set_peft_model_state_dict(model, {**state, last: torch.ones(3, 3)}, ignore_mismatched_sizes=True)
    assert sum(not torch.equal(before[name], param) for name, param in model.named_parameters()) == len(state) - 1


def test_the_bank_is_taken_from_the_state_dict_too(tmp_path: Path) -> None:
    model = get_peft_model(nets.decoder(), VBLoRAConfig(r=2, vector_length=8, num_vectors=12,
                                                        target_modules=["q_proj", "v_proj"]))
    own = get_peft_model_state_dict(model)
    state = {key: value + 1 if "vblora" in key else value for key, value in model.state_dict().items()}
    given = get_peft_model_state_dict(model, state)
    assert all(torch.equal(given[key], value + 1) for key, value in own.items())
    with pytest.raises(ValueError, match=r"the state dict given lacks 'base_model.*vblora_vector_bank.default'"):
        get_peft_model_state_dict(model, {k: v for k, v in state.items() if "bank" not in k})
    model.unload()
    assert not [name for name, _ in model.named_parameters() if "bank" in name]


def test_a_compiled_model_has_the_same_keys() -> None:
    model = get_peft_model(nets.decoder(), config())
    compiled = torch.compile(model, backend="eager")
    assert list(get_peft_model_state_dict(compiled)) == list(get_peft_model_state_dict(model))
    assert set_peft_model_state_dict(compiled, get_peft_model_state_dict(model)).unexpected_keys == []


def test_what_has_become_plain_lora_is_saved_as_that(tmp_path: Path) -> None:
    model = get_peft_model(nets.decoder(), LoHaConfig(r=2, target_modules=["q_proj"]))
    shaken(model)
    want = output(model)
    veneer.to_lora(model.get_base_model())
    model.save_pretrained(tmp_path)
    assert torch.allclose(output(PeftModel.from_pretrained(nets.decoder(), tmp_path)), want, atol=1e-5)


# -- layers -----------------------------------------------------------------------------------------------------
def test_dropout_is_switched_off_by_the_loop_that_trainers_use() -> None:
    model = get_peft_model(nets.decoder(), config(lora_dropout=0.9))
    shaken(model)
    want = output(model.eval())
    model.train()
    assert not torch.allclose(output(model), want)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.lora_dropout["default"], nn.Dropout)
    assert layer.lora_dropout["default"].p == 0.9
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    assert torch.allclose(output(model), want, atol=1e-6)
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        layer.lora_dropout["default"].p = 2


def test_a_trained_copy_is_a_module_that_can_be_called() -> None:
    model = get_peft_model(nets.encoder(), config(target_modules=["query"], modules_to_save=["classifier"]))
    shaken(model)
    head = model.base_model.model.classifier
    x = torch.randn(2, 16)
    assert isinstance(head.modules_to_save["default"], nn.Linear)
    assert torch.equal(head.modules_to_save["default"](x), head(x))
    assert not torch.equal(head.original_module(x), head(x))


def test_a_module_that_would_be_lost_is_refused() -> None:
    layer = get_peft_model(nets.decoder(), config()).base_model.model.model.layers[0].self_attn.q_proj
    with pytest.raises(TypeError, match="a module put here would be lost"):
        layer.lora_A["default"] = nn.Linear(16, 4)


def test_delta_weight_under_dora_is_the_pairs() -> None:
    model = get_peft_model(nets.decoder(), config(use_dora=True))
    shaken(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    pair = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(layer.get_delta_weight("default"), 1.5 * pair)


def test_hooks_of_a_layer_are_not_those_of_its_base() -> None:
    layer = get_peft_model(nets.decoder(), config()).base_model.model.model.layers[0].self_attn.q_proj
    seen: list[int] = []
    layer.register_forward_hook(lambda *args: seen.append(1))
    layer.base_layer(torch.zeros(1, 16))
    assert not seen
    layer(torch.zeros(1, 16))
    assert seen == [1]


# -- what PEFT users expect of calls ---------------------------------------------------------------------------
def test_partial_state_dicts_keep_the_rest() -> None:
    model = get_peft_model(nets.decoder(), config())
    shaken(model)
    own = get_peft_model_state_dict(model)
    only_A = {key: torch.ones_like(value) for key, value in own.items() if "lora_A" in key}
    result = set_peft_model_state_dict(model, {**only_A, "foo.lora_A.weight": torch.ones(1)})
    assert set(result.missing_keys) == {key for key in own if "lora_B" in key}
    assert result.unexpected_keys == ["foo.lora_A.weight"]
    now = get_peft_model_state_dict(model)
    assert all(torch.equal(now[key], only_A.get(key, own[key])) for key in own)


def test_loading_what_fits() -> None:
    folder = _saved(config())
    other = nets.decoder(layers=2)
    with pytest.warns(UserWarning, match="unexpected"):
        model = PeftModel.from_pretrained(other, folder, strict=False)
    assert "lora_A.default" in " ".join(model.state_dict())


def test_names_for_rows_are_counted() -> None:
    model = get_peft_model(nets.decoder(), config()).eval()
    with pytest.raises(ValueError, match="same as the number of inputs, but got 1 and 2 respectively"):
        output(model, adapter_names=["default"])


def test_the_config_given_says_what_has_become_of_it() -> None:
    mine = LoraConfig(r=2)
    model = get_peft_model(nets.decoder(), mine)
    assert model.peft_config["default"] is mine
    assert mine.target_modules == {"q_proj", "v_proj"}
    assert set(model.base_model.targeted_module_names) == {f"model.layers.{i}.self_attn.{name}" for i in range(3)
                                                           for name in ("q_proj", "v_proj")}


def test_parameters_are_those_that_have_names() -> None:
    model = get_peft_model(nets.decoder(tied=True), config(modules_to_save=["norm"], use_dora=True))
    assert {id(p) for p in model.parameters()} == {id(p) for _, p in model.named_parameters()}
    assert len(list(model.parameters())) == len(list(model.named_parameters()))


@pytest.mark.filterwarnings("ignore:modules_to_save")
def test_what_cannot_be_saved_is_said_at_once(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.norm = nn.BatchNorm1d(8)

    words = r"cannot hold the adapter 'default'.*veneer\.save\(model\.get_base_model\(\), path"
    with pytest.warns(UserWarning, match=words):
        model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["attention"], modules_to_save=["norm"]))
    veneer.save(model.get_base_model(), tmp_path)
    other = Net()
    other.load_state_dict(model.get_base_model().state_dict(), strict=False)
    veneer.load(other, tmp_path)


# -- what is assigned stays -----------------------------------------------------------------------------------
def test_assigned_parameters_are_the_adapters() -> None:
    model = get_peft_model(nets.decoder(), config(use_dora=True, modules_to_save=["lm_head"]))
    shaken(model)
    layer, head = model.base_model.model.model.layers[0].self_attn.q_proj, model.base_model.model.lm_head
    assert "modules_to_save" in repr(model)
    layer.lora_magnitude_vector["default"].weight = nn.Parameter(torch.ones(16))
    assert torch.equal(layer.lora_magnitude_vector["default"].weight, torch.ones(16))
    head.modules_to_save["default"].weight = nn.Parameter(torch.zeros(40, 16))
    assert not output(model).any()
    biased = get_peft_model(nets.encoder(), config(target_modules=["query"], lora_bias=True,
                                                   modules_to_save=["classifier"]))
    query = biased.base_model.model.bert.encoder.layer[0].attention.self.query
    query.lora_B["default"].bias = nn.Parameter(torch.ones(16))
    assert torch.equal(query.lora_B["default"].bias, torch.ones(16))
    classifier = biased.base_model.model.classifier
    classifier.modules_to_save["default"].bias = nn.Parameter(torch.full((3,), 5.0))
    x = torch.zeros(1, 16)
    assert torch.equal(classifier(x), torch.full((1, 3), 5.0))


def test_parameters_of_two_adapters_come_in_the_order_of_their_names() -> None:
    model = get_peft_model(nets.decoder(), config(), "a")
    model.add_adapter("b", config(use_dora=True, target_modules=["q_proj", "down_proj"]))
    assert [id(p) for p in model.parameters()] == [id(p) for _, p in model.named_parameters()]


def test_replicas_can_take_the_place_of_what_is_shown() -> None:
    """torch.nn.parallel.replicate assigns a copy of every module to its parent's."""
    model = get_peft_model(nets.decoder(), config())
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            setattr(module, name, child)
    output(model)


def test_a_layer_whose_merge_fails_keeps_what_was_merged() -> None:
    model = get_peft_model(nets.decoder(), config())
    shaken(model)
    model.add_adapter("b", config())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_A["b"].weight.fill_(torch.nan)
    layer.merge()
    with pytest.raises(ValueError, match="nothing was merged"):
        layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["default"]
