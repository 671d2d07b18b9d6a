"""PeftModel: what scripts call on it, and what they find on its layers."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from tests.peft_door import nets
from torch import Tensor, nn

import veneer
from veneer.method import VeneerError
from veneer.peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    inject_adapter_in_model,
)
from veneer.peft.tuners.lora.layer import LoraLayer


def config(**more: object) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **more}
    return LoraConfig(**options)  # type: ignore[arg-type]


def shaken(model: nn.Module, name: str = "default") -> None:
    with torch.no_grad():
        for key, param in model.named_parameters():
            if f".{name}." in key:
                param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(len(key))) * 0.1)


def output(model: nn.Module, **more: object) -> Tensor:
    with torch.no_grad():
        return model(**nets.inputs_for(model), **more).logits  # type: ignore[operator]


@pytest.fixture
def base() -> nn.Module:
    return nets.decoder()


@pytest.fixture
def model(base: nn.Module) -> PeftModel:
    made = get_peft_model(base, config())
    shaken(made)
    return made  # type: ignore[return-value]


# -- what it is ---------------------------------------------------------------------------------------------
def test_the_model_is_changed_in_place_and_starts_as_it_was() -> None:
    base = nets.decoder()
    before, names = output(base), list(base.state_dict())
    made = get_peft_model(base, config())
    assert type(made) is PeftModelForCausalLM
    assert made.get_base_model() is base
    assert torch.equal(output(made), before)
    assert isinstance(base.model.layers[0].self_attn.q_proj, nn.Linear)
    assert [name for name, param in base.named_parameters() if "lora" not in name] == names
    assert all(("lora_" in name) == param.requires_grad for name, param in made.named_parameters())


def test_state_dict_has_pefts_keys_and_loads_again(model: PeftModel) -> None:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in state
    expected = output(model)
    shaken(model)
    assert not torch.equal(output(model), expected)
    model.load_state_dict(state)
    assert torch.equal(output(model), expected)
    with pytest.raises(RuntimeError, match=r"lora_C\.default\.weight"):
        model.load_state_dict({**state, "base_model.model.model.layers.0.self_attn.q_proj.lora_C.default.weight":
                               torch.zeros(1)})


def test_trainable_names_are_the_same_for_every_way_to_walk(model: PeftModel) -> None:
    def walk(module: nn.Module, prefix: str = "") -> list[str]:
        found = [prefix + name for name in module._parameters]
        return found + [name for key, child in module.named_children() for name in walk(child, f"{prefix}{key}.")]

    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert set(trained) <= set(walk(model))  # transformers decides on weight decay by this


def test_copies_and_pickles(model: PeftModel) -> None:
    expected = output(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is PeftModelForCausalLM
        assert torch.equal(output(twin), expected)
        shaken(twin)
        assert torch.equal(output(model), expected)


def test_counts_and_what_is_printed(model: PeftModel, capsys: pytest.CaptureFixture) -> None:
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total == sum(p.numel() for p in model.parameters())
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: "
                                       f"{100 * trainable / total:.4f}\n")


def test_attributes_of_the_base_are_there(model: PeftModel) -> None:
    assert model.config is model.get_base_model().config
    assert model.base_model.model is model.get_base_model()
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False).shape == (1, 4)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


# -- layers ---------------------------------------------------------------------------------------------------
def test_a_layer_shows_its_adapter(model: PeftModel) -> None:
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, LoraLayer)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert isinstance(layer.lora_A["default"], nn.Linear)
    assert A.shape == (4, 16)
    assert B.shape == (16, 4)
    assert layer.r == {"default": 4}
    assert layer.lora_alpha["default"] == 6
    assert layer.scaling["default"] == 1.5
    assert layer.active_adapters == ["default"]
    assert not layer.merged
    assert not layer.disable_adapters
    assert layer.use_dora == {"default": False}
    assert layer.use_rslora["default"] is False
    assert torch.allclose(layer.get_delta_weight("default"), 1.5 * B @ A)
    x = torch.randn(2, 16)
    assert type(layer.base_layer) is nn.Linear
    assert layer.base_layer.weight is layer.weight
    assert torch.allclose(layer(x) - layer.base_layer(x), 1.5 * x @ A.T @ B.T, atol=1e-6)
    assert torch.allclose(layer.lora_B["default"](layer.lora_A["default"](x)), x @ A.T @ B.T)


def test_what_is_written_to_a_layer_is_the_adapters(model: PeftModel) -> None:
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    bare = layer.base_layer(torch.ones(1, 16))
    layer.lora_B["default"].weight = nn.Parameter(torch.zeros(16, 4))
    assert torch.equal(layer(torch.ones(1, 16)), bare)
    nn.init.ones_(layer.lora_B["default"].weight)
    layer.scaling["default"] = 0.0
    assert torch.equal(layer(torch.ones(1, 16)), bare)
    layer.set_scale("default", 2.0)
    assert layer.scaling["default"] == 3.0
    layer.scale_layer(2.0)
    layer.unscale_layer(4.0)
    assert layer.scaling["default"] == 1.5
    layer.unscale_layer()
    assert layer.scaling["default"] == 1.5
    with pytest.raises(ValueError, match=r"has shape \(16, 4\), got \(4, 16\)"):
        layer.lora_B["default"].weight = nn.Parameter(torch.zeros(4, 16))
    with pytest.raises(TypeError, match="belongs to the adapter's config"):
        layer.r["default"] = 3


def test_a_layer_merges_by_itself(model: PeftModel) -> None:
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x, weight = torch.randn(2, 16), layer.weight.clone()
    expected = layer(x)
    layer.merge()
    assert layer.merged_adapters == ["default"]
    assert torch.allclose(layer(x), expected, atol=1e-6)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), expected)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_dora_shows_its_magnitude() -> None:
    made = get_peft_model(nets.decoder(), config(use_dora=True))
    layer = made.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.use_dora == {"default": True}
    assert torch.allclose(layer.lora_magnitude_vector["default"].weight, layer.weight.norm(dim=1))


# -- several adapters -------------------------------------------------------------------------------------------
def test_adapters_are_added_and_switched(model: PeftModel) -> None:
    expected = output(model)
    model.add_adapter("other", config(r=2, target_modules=["q_proj"]))
    assert model.active_adapter == "default"
    assert torch.equal(output(model), expected)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    model.set_adapter("other")
    assert all((".other." in n) == p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    with model.disable_adapter():
        bare = output(model)
    assert torch.equal(output(model), bare)  # the new one changes nothing yet
    model.set_adapter("other", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("other")
    assert torch.equal(output(model), expected)
    assert list(model.peft_config) == ["default"]
    for call in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match="other"):
            call("other")
    with pytest.raises(ValueError, match="'default' already exists"):
        model.add_adapter("default", config())


def test_rows_of_a_batch_go_different_ways(model: PeftModel) -> None:
    one = output(model)
    model.add_adapter("other", config(r=2))
    model.set_adapter("other")
    shaken(model, "other")
    two = output(model)
    with model.disable_adapter():
        bare = output(model)
    for names, want in ((["default", "other"], (one, two)), (["__base__", "default"], (bare, one))):
        mixed = output(model, adapter_names=names)
        for row in range(2):
            assert torch.allclose(mixed[row], want[row][row], atol=1e-6)
    ids = nets.inputs_for(model)["input_ids"]
    together = model.generate(input_ids=ids, adapter_names=["default", "other"], num_beams=2, max_new_tokens=3,
                              do_sample=False)
    model.set_adapter("default")
    alone = model.generate(input_ids=ids[:1], num_beams=2, max_new_tokens=3, do_sample=False)
    assert torch.equal(together[:1, :alone.shape[1]], alone)
    with pytest.raises(ValueError, match=r"non-existing adapter.*: nobody"):
        output(model, adapter_names=["default", "nobody"])
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        output(model, adapter_names=["default", "other"])


def test_weighted_adapters_add_up(model: PeftModel) -> None:
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    model.add_adapter("other", config(r=2, target_modules=["q_proj"]))
    shaken(model, "other")
    want = 0.5 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("other")
    for way, rank in (("linear", 6), ("cat", 6), ("svd", 6)):
        model.add_weighted_adapter(["default", "other"], [0.5, -2.0], way, way, svd_rank=6)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert torch.allclose(layer.get_delta_weight(way), want, atol=1e-5), way
        assert layer.r[way] == rank
        assert model.peft_config[way].r == rank
    for way in ("ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd", "magnitude_prune",
                "magnitude_prune_svd"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], way, way, density=0.5)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert layer.r[way] == 4
        assert not torch.allclose(layer.get_delta_weight(way), want)
    assert model.active_adapter == "default"
    with pytest.raises(ValueError, match="combination_type: 'linaer'; did you mean 'linear'"):
        model.add_weighted_adapter(["default"], [1.0], "new", "linaer")
    with pytest.raises(ValueError, match="Adapter othre does not exist; did you mean 'other'"):
        model.add_weighted_adapter(["othre"], [1.0], "new")
    with pytest.raises(ValueError, match="one weight for each adapter, got 2 adapters and 1"):
        model.add_weighted_adapter(["default", "other"], [1.0], "new")
    with pytest.raises(NotImplementedError, match="svd_clamp"):
        model.add_weighted_adapter(["default"], [1.0], "new", svd_clamp=0.9)


# -- merging ------------------------------------------------------------------------------------------------
def test_merging_and_unloading(model: PeftModel, base: nn.Module) -> None:
    expected, weight = output(model), base.model.layers[0].self_attn.q_proj.weight.clone()
    model.merge_adapter()
    assert torch.allclose(output(model), expected, atol=1e-5)
    for call in (lambda: model.add_adapter("other", config()), lambda: model.delete_adapter("default")):
        with pytest.raises(ValueError, match=r"while 'default' is merged; call unmerge_adapter\(\) first"):
            call()
    with pytest.raises(ValueError, match="merged adapters, please call `unmerge_adapter`"):
        output(model, adapter_names=["default", "default"])
    assert list(model.peft_config) == ["default"]
    model.unmerge_adapter()
    assert torch.equal(base.model.layers[0].self_attn.q_proj.weight, weight)
    merged = model.merge_and_unload()
    assert merged is base
    assert type(base.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.allclose(output(merged), expected, atol=1e-5)


def test_unloading_gives_the_base_back() -> None:
    base, untouched = nets.decoder(), nets.decoder()
    made = get_peft_model(base, config(modules_to_save=["lm_head"]))
    shaken(made)
    assert made.unload() is base
    assert list(base.state_dict()) == list(untouched.state_dict())
    assert torch.equal(output(base), output(untouched))


# -- files ----------------------------------------------------------------------------------------------------
def test_saved_as_given_and_read_again(model: PeftModel, tmp_path: Path) -> None:
    model.add_adapter("other", config(r=2))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "adapter_config.json", "veneer.json",
                                                          "adapter_model.safetensors", "other"}
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["target_modules"] == ["q_proj", "v_proj"]
    assert said["task_type"] == "CAUSAL_LM"
    assert (said["r"], said["lora_alpha"], said["inference_mode"]) == (4, 6, True)
    read = PeftModel.from_pretrained(nets.decoder(), tmp_path)
    assert type(read) is PeftModelForCausalLM
    assert torch.equal(output(read), output(model))
    assert not read.training
    assert not any(p.requires_grad for p in read.parameters())
    assert read.load_adapter(tmp_path / "other", "second").missing_keys == []
    assert list(read.peft_config) == ["default", "second"]
    assert read.active_adapter == "default"
    again = PeftModel.from_pretrained(nets.decoder(), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in again.parameters())


def test_loading_is_strict_and_leaves_the_model_alone(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    small = nets.decoder(layers=2)
    before = output(small)
    with pytest.raises(VeneerError, match=r"unexpected.*layers\.2\.self_attn\.q_proj"):
        PeftModel.from_pretrained(small, tmp_path)
    assert torch.equal(output(small), before)
    with pytest.raises(ValueError, match="there is no folder"):
        PeftModel.from_pretrained(small, tmp_path / "nothing", local_files_only=True)


def test_what_cannot_be_saved(model: PeftModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safe_serialization=False would write a pickle file"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="save_embedding_layers=True"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"\['nobody'\], current supported"):
        model.save_pretrained(tmp_path, selected_adapters=["nobody"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        model.save_pretrained(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_start_that_is_not_zero_is_saved_as_plain_lora(tmp_path: Path) -> None:
    base = nets.decoder()
    before, weight = output(base), base.model.layers[0].self_attn.q_proj.weight.clone()
    made = get_peft_model(base, config(init_lora_weights="pissa"))
    assert torch.equal(output(made), before)
    assert torch.equal(base.model.layers[0].self_attn.q_proj.weight, weight)
    shaken(made)
    made.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["r"] == 8
    assert said["init_lora_weights"] is True
    read = PeftModel.from_pretrained(nets.decoder(), tmp_path)
    assert torch.allclose(output(read), output(made), atol=1e-6)


def test_values_of_a_state_dict_are_saved(model: PeftModel, tmp_path: Path) -> None:
    state = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    read = PeftModel.from_pretrained(nets.decoder(), tmp_path)
    with model.disable_adapter():
        assert torch.equal(output(read), output(model))


# -- without a PeftModel ----------------------------------------------------------------------------------------
def test_injected_adapters() -> None:
    base = nets.decoder()
    assert inject_adapter_in_model(config(), base) is base
    assert any("lora_A.default" in name for name, _ in base.named_parameters())
    state = {"base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight": torch.zeros(4, 16)}
    other = inject_adapter_in_model(config(), nets.decoder(), state_dict=state)
    assert {name.rpartition(".lora_")[0] for name, _ in other.named_parameters() if "lora_" in name} == {
        "model.layers.1.self_attn.k_proj"}
    veneer.detach(base)
    assert list(base.state_dict()) == list(nets.decoder().state_dict())


def test_a_config_of_the_real_peft_is_refused_by_name() -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(TypeError, match=r"such as LoraConfig; got a peft\..*LoraConfig"):
        get_peft_model(nets.decoder(), peft.LoraConfig(target_modules=["q_proj"]))


def test_dtypes_of_adapters() -> None:
    half = nets.decoder().to(torch.bfloat16)
    made = get_peft_model(half, config())
    assert {p.dtype for n, p in made.named_parameters() if "lora_" in n} == {torch.float32}
    half = nets.decoder().to(torch.bfloat16)
    made = get_peft_model(half, config(), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in made.named_parameters() if "lora_" in n} == {torch.bfloat16}


def test_seeded_by_torchs_generator() -> None:
    def first() -> Tensor:
        torch.manual_seed(11)
        made = get_peft_model(nets.decoder(), config())
        return made.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight

    one, two = first(), first()
    assert torch.equal(one, two)
    third = get_peft_model(nets.decoder(), config())
    assert not torch.equal(third.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight, one)


def test_replicated_layers_are_saved_and_loaded(tmp_path: Path) -> None:
    base = nets.decoder()
    made = get_peft_model(base, config(layer_replication=[[0, 2], [1, 3]]))
    assert len(base.model.layers) == 4
    shaken(made)
    made.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layer_replication"] == [[0, 2], [1, 3]]
    read = PeftModel.from_pretrained(nets.decoder(), tmp_path)
    assert torch.equal(output(read), output(made))
    shaken(read)
    read.load_adapter(tmp_path, "default")
    assert torch.equal(output(read), output(made))
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(nets.decoder(), tmp_path).eval()
    assert torch.allclose(output(theirs), output(made), atol=1e-5)


def test_a_config_that_adapts_nothing() -> None:
    with pytest.raises(VeneerError, match="its config adapts nothing"):
        get_peft_model(nets.decoder(), config(target_modules="dummy-target-modules"))


def test_adalora_layers_show_their_values() -> None:
    made = get_peft_model(nets.decoder(), AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_alpha=6,
                                                        target_modules=["q_proj"]))
    layer = made.base_model.model.model.layers[0].self_attn.q_proj
    assert (layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"]) == (4, 6, 1.5)
    layer.scaling["default"] = 3.0
    layer.set_scale("default", 0.5)
    assert layer.scaling["default"] == 0.75
    assert layer.lora_E["default"].shape == (4,)
