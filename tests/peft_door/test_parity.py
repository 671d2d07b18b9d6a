"""Beside the installed peft, on the same models and configs: names, counts, outputs, gradients, merged weights, files.

What is known to be different is in `NAMES` and in docs/coming-from-peft.md, and nowhere else.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.peft_door import nets
from torch import Tensor, nn

import veneer.peft as ours

theirs = pytest.importorskip("peft")

#: per architecture: targets, a module to train whole, and the layers' name of its inputs' embedding
PLACES: dict[str, dict[str, Any]] = {
    "decoder": {"targets": ["q_proj", "v_proj", "down_proj"], "whole": ["lm_head"], "table": "embed_tokens"},
    "conv1d": {"targets": ["c_attn", "c_fc"], "whole": ["ln_f"], "table": "wte"},
    "encoder": {"targets": ["query", "value", "dense"], "whole": ["classifier"], "table": "word_embeddings"},
    "encoder_decoder": {"targets": ["q", "v", "wo"], "whole": ["final_layer_norm"], "table": None},
    "vision": {"targets": ["q_proj", "v_proj", "fc1"], "whole": ["classifier"], "table": None},
    "experts": {"targets": ["q_proj", "v_proj"], "whole": ["lm_head"], "table": "embed_tokens"},
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 6}),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "patterns": ("LoraConfig", {"r": 4, "rank_pattern": {"v_proj|value|c_fc": 2}, "alpha_pattern": {"q_proj": 32}}),
    "bias-all": ("LoraConfig", {"r": 2, "bias": "all"}),
    "bias-lora": ("LoraConfig", {"r": 2, "bias": "lora_only"}),
    "lora-bias": ("LoraConfig", {"r": 2, "lora_alpha": 6, "lora_bias": True}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 6}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 3}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 3}),
    "vera": ("VeraConfig", {"r": 6}),
    "vblora": ("VBLoRAConfig", {"r": 2, "vector_length": 8, "num_vectors": 12}),
    "randlora": ("RandLoraConfig", {"r": 3}),
}
#: names of trained parameters that differ on purpose: (pattern in PEFT's name, what it is here)
NAMES = [
    # bias="all" of modules that carry no adapter: the base keeps its own bias, and a copy is trained
    (r"^(?!.*(?:lora_B|modules_to_save))(.*?)(?<!base_layer)\.bias$", r"\1.base_layer.bias"),
]
#: methods that PEFT does not have on an architecture's layers, and neither have we
REFUSED = [("conv1d", "loha"), ("conv1d", "lokr")]


def made(library: Any, arch: str, config: str, **more: Any) -> nn.Module:
    kind, options = CONFIGS[config]
    options = {"target_modules": list(PLACES[arch]["targets"]), **copy.deepcopy(options), **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.get_peft_model(base(arch, config), getattr(library, kind)(**options)).eval()


def base(arch: str, config: str) -> nn.Module:
    """The bare model. PEFT rounds RandLoRA's products in an order of its own, which in fp32 shows; fused experts have
    no fp64."""
    return getattr(nets, arch)().to(torch.float64 if config == "randlora" and arch != "experts" else torch.float32)


def shaken(model: nn.Module) -> nn.Module:
    """With trained parameters that are not where they started."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, param in sorted(trained(model).items()):
            param.add_(torch.randn(param.shape, generator=generator) * 0.05)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def named_here(name: str) -> str:
    for pattern, here in NAMES:
        name = re.sub(pattern, here, name)
    return name


def output(model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    inputs = {key: value.to(dtype) if value.is_floating_point() else value
              for key, value in nets.inputs_for(model).items()}
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[operator]


def close(mine: Tensor, other: Tensor) -> None:
    assert (mine - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))


CASES = [pytest.param(arch, config, id=f"{arch}-{config}") for arch in PLACES for config in CONFIGS
         if (arch, config) not in REFUSED]


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Callable[..., tuple[nn.Module, nn.Module]]:
    def build(arch: str, config: str, **more: Any) -> tuple[nn.Module, nn.Module]:
        other = shaken(made(theirs, arch, config, **more))
        mine = made(ours, arch, config, **more)
        result = ours.set_peft_model_state_dict(mine, theirs.get_peft_model_state_dict(other))
        assert not result.missing_keys
        assert not result.unexpected_keys
        return mine, other

    return build


@pytest.mark.parametrize(("arch", "config"), CASES)
def test_same_trainable_names_and_counts(arch: str, config: str) -> None:
    mine, other = made(ours, arch, config), made(theirs, arch, config)
    counts = {named_here(name): param.numel() for name, param in trained(other).items()}
    assert {name: param.numel() for name, param in trained(mine).items()} == counts
    trainable, total = mine.get_nb_trainable_parameters()  # type: ignore[operator]
    their_trainable, their_total = other.get_nb_trainable_parameters()  # type: ignore[operator]
    ranks = sum("ranknum" in name for name, _ in other.named_parameters())  # a number for each layer, no parameter here
    copies = sum(count for name, count in counts.items() if name.endswith("base_layer.bias"))  # PEFT trains the base's
    assert (trainable, total) == (their_trainable, their_total - ranks + copies)


@pytest.mark.parametrize(("arch", "config"), REFUSED)
def test_refused_where_peft_refuses(arch: str, config: str) -> None:
    with pytest.raises(TypeError, match=r"Conv1D.* not supported"):
        made(theirs, arch, config)
    with pytest.raises(TypeError, match=r"Conv1D.* not supported"):
        made(ours, arch, config)


@pytest.mark.parametrize(("arch", "config"), CASES)
def test_same_outputs_and_merged_weights(pair: Callable, arch: str, config: str) -> None:
    mine, other = pair(arch, config)
    close(output(mine), output(other))
    if config == "lora-bias" and arch in ("decoder", "encoder_decoder", "experts"):
        expected = output(other)
        with pytest.raises(RuntimeError, match="base layer has no bias"):
            other.merge_and_unload()
        close(output(mine.merge_and_unload()), expected)
        return
    merged, their_merged = mine.merge_and_unload(), other.merge_and_unload()
    weights = dict(their_merged.named_parameters())
    for name, param in merged.named_parameters():
        close(param, weights[name])


@pytest.mark.parametrize(("arch", "config"), CASES)
def test_files_both_ways(pair: Callable, arch: str, config: str, tmp_path: Path) -> None:
    mine, other = pair(arch, config)
    mine.save_pretrained(tmp_path / "mine")
    other.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = theirs.PeftModel.from_pretrained(base(arch, config), tmp_path / "mine").eval()
        mine_read = ours.PeftModel.from_pretrained(base(arch, config), tmp_path / "theirs")
        again = ours.PeftModel.from_pretrained(base(arch, config), tmp_path / "mine")
    close(output(read), output(other))
    close(output(mine_read), output(other))
    assert torch.equal(output(again), output(mine))


# -- further options, where they mean something ----------------------------------------------------------------
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "conv2d": ("vision", {"target_modules": ["projection", "q_proj"], "r": 4, "lora_alpha": 6}),
    "embedding": ("decoder", {"target_modules": ["embed_tokens", "q_proj"], "r": 4, "lora_alpha": 6}),
    "embedding-dora": ("decoder", {"target_modules": ["embed_tokens"], "r": 4, "use_dora": True}),
    "whole-head": ("decoder", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "whole-classifier": ("encoder", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "tokens": ("decoder", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}),
    "tokens-of-a-layer": ("conv1d", {"target_modules": ["c_attn"], "trainable_token_indices": {"wpe": [1, 2]}}),
    "regex": ("decoder", {"target_modules": r".*\.1\..*(q|v)_proj"}),
    "all-linear": ("decoder", {"target_modules": "all-linear"}),
    "all-linear-conv1d": ("conv1d", {"target_modules": "all-linear"}),
    "by-architecture": ("decoder", {"target_modules": None}),
    "layers": ("decoder", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "excluded": ("decoder", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "experts": ("experts", {"target_modules": ["q_proj"],
                            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "tied": ("tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied-tokens": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}),
}


def _net(arch: str) -> nn.Module:
    return nets.decoder(tied=True) if arch == "tied" else getattr(nets, arch)()


@pytest.fixture(params=FURTHER)
def further(request: pytest.FixtureRequest) -> tuple[str, nn.Module, nn.Module]:
    arch, options = FURTHER[request.param]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = theirs.get_peft_model(_net(arch), theirs.LoraConfig(**copy.deepcopy(options))).eval()
        mine = ours.get_peft_model(_net(arch), ours.LoraConfig(**copy.deepcopy(options))).eval()
        counts = {named_here(name): param.numel() for name, param in trained(other).items()}
        if request.param == "tied":  # PEFT has another adapter, with the same values, in the head; here it is the same
            counts = {name: count for name, count in counts.items() if "lm_head" not in name}
        assert {name: param.numel() for name, param in trained(mine).items()} == counts
        shaken(other)
        result = ours.set_peft_model_state_dict(mine, theirs.get_peft_model_state_dict(other))
    assert not result.missing_keys
    assert not result.unexpected_keys
    return arch, mine, other


def test_further_options_compute_the_same_and_merge_the_same(further: tuple[str, nn.Module, nn.Module]) -> None:
    arch, mine, other = further
    expected = output(other)
    close(output(mine), expected)
    if arch == "tied":  # PEFT adds the change to the one tensor once for each of its places
        close(output(mine.merge_and_unload()), expected)  # type: ignore[operator]
        return
    weights = dict(other.merge_and_unload().named_parameters())  # type: ignore[operator]
    for name, param in mine.merge_and_unload().named_parameters():  # type: ignore[operator]
        close(param, weights[name])


def test_further_options_in_files_both_ways(further: tuple[str, nn.Module, nn.Module], tmp_path: Path) -> None:
    arch, mine, other = further
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine.save_pretrained(tmp_path / "mine")  # type: ignore[operator]
        other.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)  # type: ignore[operator]
        read = theirs.PeftModel.from_pretrained(_net(arch), tmp_path / "mine").eval()
        mine_read = ours.PeftModel.from_pretrained(_net(arch), tmp_path / "theirs")
    close(output(read), output(other))
    close(output(mine_read), output(other))


@pytest.mark.parametrize("config", ["lora", "dora", "loha", "lokr", "vera"])
def test_same_gradients(pair: Callable, config: str) -> None:
    mine, other = pair("decoder", config)
    for model in (mine, other):
        model.train()
        model(**nets.inputs_for(model)).logits.square().mean().backward()
    grads = {name: param.grad for name, param in trained(other).items()}
    for name, param in trained(mine).items():
        close(param.grad.reshape(-1), grads[name].reshape(-1))
