"""Tools of torch that put other tensors in the place of a model's parameters, or walk its modules."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.peft_door import nets
from torch import Tensor, nn

from veneer.peft import AdaLoraConfig, LoHaConfig, LoraConfig, VeraConfig, get_peft_model

CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]),
    "whole": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "adalora": AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["q_proj"]),
    "loha": LoHaConfig(r=2, target_modules=["q_proj"]),
    "vera": VeraConfig(r=2, target_modules=["q_proj"]),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    made = get_peft_model(nets.decoder(), CONFIGS[request.param]).eval()
    with torch.no_grad():
        for i, param in enumerate(made.parameters()):
            if param.requires_grad:
                param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    return made


def output(model: Any) -> Tensor:
    return model(**nets.inputs_for(nets.decoder())).logits


def test_every_module_that_holds_something_is_among_the_modules(model: Any) -> None:
    """What nn.DataParallel's replicas are made from."""
    seen = set(model.modules())
    assert all(child in seen for module in list(seen) for child in module._modules.values() if child is not None)


def test_functional_calls_use_the_parameters_given(model: Any) -> None:
    params = {name: param.detach() * 2 for name, param in model.named_parameters() if param.requires_grad}
    with torch.no_grad():
        got = torch.func.functional_call(model, params, kwargs=nets.inputs_for(nets.decoder())).logits
        before = output(model)
        for param in model.parameters():
            if param.requires_grad:
                param.mul_(2)
        assert torch.allclose(got, output(model), atol=1e-6)
        assert not torch.equal(got, before)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["lora", "dora", "loha"], indirect=True)
def test_sharded_by_fsdp_every_parameter_is_trained(model: Any, process: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    before = output(sharded)
    params = [param for param in sharded.parameters() if param.requires_grad]
    old = [param.detach().clone() for param in params]
    before.sum().backward()
    torch.optim.SGD(params, lr=1.0).step()
    assert not [i for i, (a, b) in enumerate(zip(params, old, strict=True)) if torch.equal(a, b)]
    assert not torch.equal(output(sharded), before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["lora", "dora", "whole"], indirect=True)
def test_sharded_by_fsdp_block_by_block(model: Any, process: None) -> None:
    import functools

    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    want = output(model).detach()
    kinds = {type(model.get_base_model().model.layers[0])}
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=kinds)
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"),
                                       auto_wrap_policy=policy)
    assert torch.allclose(output(sharded), want, atol=1e-6)
    params = [param for param in sharded.parameters() if param.requires_grad]
    old = [param.detach().clone() for param in params]
    output(sharded).sum().backward()
    torch.optim.SGD(params, lr=1.0).step()
    assert not [i for i, (a, b) in enumerate(zip(params, old, strict=True)) if torch.equal(a, b)]


@pytest.mark.parametrize("model", ["lora", "dora", "loha"], indirect=True)
def test_sharded_by_fully_shard_every_parameter_is_trained(model: Any, process: None) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (1,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fully_shard(model, mesh=mesh)
    params = [param for param in model.parameters() if param.requires_grad]
    old = [param.detach().full_tensor().clone() for param in params]  # type: ignore[attr-defined]
    before = output(model)
    before.sum().backward()
    torch.optim.SGD(params, lr=1.0).step()
    assert not [i for i, (a, b) in enumerate(zip(params, old, strict=True))
                if torch.equal(a.detach().full_tensor(), b)]  # type: ignore[attr-defined]
    assert not torch.equal(output(model), before)


def test_moved_and_cast(model: Any) -> None:
    double = model.to(torch.float64)
    assert {param.dtype for param in double.parameters()} == {torch.float64}
    assert output(double).dtype == torch.float64
    assert nn.Module.to(double, torch.float32) is double
