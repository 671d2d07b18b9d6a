"""Files of LyCORIS's: what `convert_file` writes, LyCORIS loads and computes the same change, and the other way."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import veneer
from veneer import DoRA, LoHa, LoKr, LoRA
from veneer.attach import attached

from .compare import BAR, relative

pytest.importorskip("lycoris", reason="files are compared with lycoris_lora's")
wrapper = pytest.importorskip("lycoris.wrapper")

RULES = {
    "lora": {"*": LoRA(rank=3, alpha=5)},
    "lora_no_float32": {"*": LoRA(rank=3, alpha=0.1)},
    "rslora": {"*": LoRA(rank=3, alpha=5, rank_stabilized=True)},
    "dora": {"*": DoRA(LoRA(rank=3, alpha=5))},
    "loha": {"*": LoHa(rank=3, alpha=5)},
    "loha_effective": {"*conv*": LoHa(rank=3, alpha=5, effective_conv=True)},
    "loha_dora": {"*": DoRA(LoHa(rank=3, alpha=5))},
    "lokr": {"*": LoKr(rank=1, alpha=5)},
    "lokr_whole": {"*": LoKr(rank=99, alpha=7)},
    "lokr_both": {"mlp.*": LoKr(rank=1, alpha=5, decompose_both=True)},
    "lokr_dora": {"mlp.*": DoRA(LoKr(rank=1, alpha=5))},
}


def base() -> nn.Module:
    torch.manual_seed(3)
    return nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(12, 20), "down": nn.Linear(20, 16, bias=False)}),
                          "conv": nn.Conv2d(12, 16, 3), "conv_1": nn.Conv1d(12, 8, 3)})


INPUTS = {"mlp.up_proj": (5, 12), "mlp.down": (5, 20), "conv": (2, 12, 5, 6), "conv_1": (2, 12, 9)}


@torch.no_grad()
def outputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """What each layer puts out, without its bias."""
    found = {}
    for name, size in INPUTS.items():
        torch.manual_seed(8)
        layer, x = model.get_submodule(name), torch.randn(size)
        found[name] = layer(x) - layer(torch.zeros_like(x))
    return found


def theirs(path) -> dict[str, torch.Tensor]:
    """The outputs once LyCORIS has laid a file over the base. Not what its `merge_to` makes of the weights: that takes
    the scale of LoHa and LoKr twice (4.1.3, `get_diff_weight` over `get_weight`)."""
    model = base().requires_grad_(False)
    with torch.no_grad():
        network, _ = wrapper.create_lycoris_from_weights(1.0, str(path), model)
    assert network.loras
    network.apply_to()
    return outputs(model)


def assert_equal(found: dict[str, torch.Tensor], model: nn.Module) -> None:
    before, ours = outputs(base()), outputs(model)
    adapted = {weight.name for weight, _ in attached(model, "default")}
    for name, output in ours.items():
        assert (relative(output, before[name]) > 1e-2) == (name in adapted)
        assert relative(found[name], output) < BAR, name


@pytest.mark.parametrize("case", RULES)
def test_lycoris_loads_what_is_written(case, tmp_path):
    model = base()
    veneer.attach(model, RULES[case])
    with torch.no_grad():
        for param in veneer.trainable(model):
            param.add_(torch.randn_like(param) * 0.3)
    veneer.save(model, tmp_path / "a")
    veneer.convert_file(tmp_path / "a", tmp_path / "l.safetensors", "lycoris")
    assert_equal(theirs(tmp_path / "l.safetensors"), model)


OPTIONS = {
    "lora": {"algo": "lora"},
    "dora": {"algo": "lora", "dora_wd": True},
    "loha": {"algo": "loha"},
    "loha_tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr"},
    "lokr_factor": {"algo": "lokr", "factor": 2, "decompose_both": True},
    "lokr_whole": {"algo": "lokr", "full_matrix": True},
    "lokr_dora": {"algo": "lokr", "dora_wd": True},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_what_lycoris_writes_is_loaded(case, tmp_path):
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = wrapper.create_lycoris(base(), 1.0, 2, 3, conv_dim=2, conv_alpha=3, **OPTIONS[case])
    network.apply_to()
    with torch.no_grad():
        for param in network.parameters():
            param.add_(torch.randn_like(param) * 0.3)
    network.save_weights(str(tmp_path / "l.safetensors"), torch.float32, {})
    assert load_file(tmp_path / "l.safetensors")
    veneer.convert_file(tmp_path / "l.safetensors", tmp_path / "n", "native", base=base())
    model = base()
    assert veneer.load(model, tmp_path / "n").problems == ()
    assert len(attached(model, "default")) == len(INPUTS)
    assert_equal(theirs(tmp_path / "l.safetensors"), model)
