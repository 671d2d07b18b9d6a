"""Layers over bitsandbytes' by PEFT's names, weights read as dense numbers, sharding, and what walks a model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import veneer
from veneer.peft import LoraConfig, PeftModel, get_peft_model
from veneer.peft.tuners.lora import Linear, Linear4bit, Linear8bitLt
from veneer.peft.tuners.lora.bnb import Linear4bit as AtItsPlace
from veneer.peft.utils import _get_submodules, id_tensor_storage
from veneer.peft.utils.integrations import dequantize_module_weight, gather_params_ctx, get_bnb_param_type
from veneer.peft.utils.other import fsdp_auto_wrap_policy
from veneer.storage import packed_storage

from . import nets


# -- layers that hold their weight in fewer bits ---------------------------------------------------------------
def small(scheme: str | None, adapted: bool = True) -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    if scheme is not None:
        if scheme.startswith("bnb"):
            pytest.importorskip("bitsandbytes")
        veneer.quantize(model, scheme)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)) if adapted else model


@pytest.mark.parametrize(("scheme", "face"), [("bnb-nf4", Linear4bit), ("bnb-int8", Linear8bitLt), ("nf4", Linear),
                                              (None, Linear)])
def test_layers_are_pefts_by_how_the_weight_is_held(scheme: str | None, face: type[nn.Module]) -> None:
    layer = small(scheme).base_model.model[0]
    special = {kind for kind in (Linear4bit, Linear8bitLt) if isinstance(layer, kind)}
    assert special | {Linear} == {face, Linear}
    assert isinstance(layer, Linear)
    assert AtItsPlace is Linear4bit


def test_a_second_adapter_and_an_end_of_the_first() -> None:
    model = small("bnb-nf4")
    model.add_adapter("more", LoraConfig(r=2, target_modules=["0", "1"]))
    assert [isinstance(layer, Linear4bit) for layer in model.base_model.model] == [True, True]
    with pytest.warns(UserWarning, match="'1' and 0 other layers had no adapter and are still quantised"):
        plain = model.merge_and_unload()
    assert [type(layer).__name__ for layer in plain] == ["Linear", "Linear4bit"]


@pytest.mark.parametrize("scheme", ["bnb-nf4", "bnb-int8", "nf4"])
def test_packed_weights_are_read(scheme: str) -> None:
    bare = small(scheme, adapted=False)
    storage = packed_storage(bare[0])
    assert storage is not None
    expected = storage.read(bare[0])
    assert torch.equal(dequantize_module_weight(bare[0]), expected)
    model = small(scheme)
    layer = model.base_model.model[0]
    for each in (layer, layer.base_layer):
        assert torch.equal(dequantize_module_weight(each), expected)
    model.merge_adapter()
    torch.testing.assert_close(dequantize_module_weight(layer), expected + layer.get_delta_weight("default"))


@pytest.mark.parametrize("scheme", ["bnb-nf4", "bnb-int8"])
def test_packed_weights_are_those_that_peft_reads(scheme: str) -> None:
    theirs = pytest.importorskip("peft.utils.integrations")
    bare = small(scheme, adapted=False)
    mine = dequantize_module_weight(bare[0])
    torch.testing.assert_close(mine, theirs.dequantize_module_weight(bare[0]), check_dtype=False, rtol=2e-3, atol=1e-4)
    assert get_bnb_param_type(bare[0].weight) == theirs.get_bnb_param_type(bare[0].weight)
    assert get_bnb_param_type(nn.Parameter(torch.ones(1))) is False


def test_other_weights_are_themselves() -> None:
    layer = small(None).base_model.model[0]
    assert dequantize_module_weight(layer) is layer.weight
    with pytest.raises(TypeError, match="the weight of this Tanh is None"):
        dequantize_module_weight(nn.Tanh())


# -- DeepSpeed ------------------------------------------------------------------------------------------------
def test_parameters_are_gathered_where_deepspeed_has_spread_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    @contextlib.contextmanager
    def gathered(params: Any, modifier_rank: int | None, fwd_module: Any) -> Iterator[None]:
        seen.append((params, modifier_rank, fwd_module))
        yield

    here, spread = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    spread.ds_id = 3  # type: ignore[attr-defined]
    stand_in: Any = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gathered))
    monkeypatch.setitem(sys.modules, "deepspeed", stand_in)
    with gather_params_ctx(here), gather_params_ctx(iter([here, here])):
        assert seen == []
    with gather_params_ctx([here, spread], modifier_rank=None):
        assert [(len(params), rank, module) for params, rank, module in seen] == [(2, None, None)]
    monkeypatch.delitem(sys.modules, "deepspeed")
    with gather_params_ctx(spread):
        assert len(seen) == 1


# -- FSDP -----------------------------------------------------------------------------------------------------
@pytest.fixture
def process(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/together", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def decoder() -> PeftModel:
    return get_peft_model(nets.decoder(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


def test_fsdp_makes_a_unit_of_each_block(process: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    expected = decoder()(**nets.inputs_for(nets.decoder())).logits
    model: Any = decoder()
    sharded = FullyShardedDataParallel(model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=True,
                                       device_id=torch.device("cpu"))
    blocks = model.get_base_model().model.layers
    assert {type(block) for block in blocks} == {FullyShardedDataParallel}
    assert sum(isinstance(module, FullyShardedDataParallel) for module in sharded.modules()) == len(blocks) + 1
    out = sharded(**nets.inputs_for(nets.decoder())).logits
    assert torch.equal(out, expected)
    params = [param for param in sharded.parameters() if param.requires_grad]
    old = [param.detach().clone() for param in params]
    out.square().sum().backward()
    torch.optim.SGD(params, lr=1.0).step()
    changed = sum(not torch.equal(a, b) for a, b in zip(params, old, strict=True))
    assert changed == len(params) // 2  # each B; the gradient of A is zero in the first step


def test_blocks_are_named_by_the_model_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def classes(model: nn.Module) -> set[str]:
        policy = fsdp_auto_wrap_policy(model)
        return {type(module).__name__ for module in model.modules() if policy(module, recurse=False)}

    assert classes(decoder()) == {"LlamaDecoderLayer"}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP, LlamaAttention")
    assert classes(decoder()) == {"LlamaMLP", "LlamaAttention"}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMPL")
    with pytest.raises(TypeError, match="names 'LlamaMPL', which no module of the model is; did you mean 'LlamaMLP'"):
        classes(decoder())
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP")
    with pytest.raises(TypeError, match="its _no_split_modules is None; name the class of its blocks in the env"):
        classes(nn.Sequential(nn.Linear(2, 2)))


# -- walking --------------------------------------------------------------------------------------------------
def test_submodules_by_name() -> None:
    model: Any = decoder()
    above, layer, name = _get_submodules(model, "base_model.model.model.layers.0.self_attn.q_proj")
    assert above is model.base_model.model.model.layers[0].self_attn
    assert layer is above.q_proj
    assert name == "q_proj"
    assert _get_submodules(model, "base_model") == (model, model.base_model, "base_model")


def test_storages_are_told_apart() -> None:
    tensor = torch.ones(4, 4)
    assert id_tensor_storage(tensor[1:]) == id_tensor_storage(tensor)
    assert id_tensor_storage(tensor.clone()) != id_tensor_storage(tensor)
    theirs = pytest.importorskip("peft.utils.other").id_tensor_storage
    assert theirs(tensor) == id_tensor_storage(tensor)
