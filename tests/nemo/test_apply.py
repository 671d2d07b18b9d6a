"""apply_lora_to_linear_modules on whole models: NeMo's Llama, what is trained, freezing, experts, seeds."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import veneer
from veneer import LoRA
from veneer.inspect.summary import adapters
from veneer.method import VeneerError, VeneerWarning
from veneer.nemo import LinearLoRA, PeftConfig, TritonLinearLoRA, apply_lora_to_linear_modules

from .nets import META, Experts, Toy, golden_factors, golden_llama


def adapted_llama():
    model, data = golden_llama()
    count = apply_lora_to_linear_modules(model, PeftConfig(**META["llama"]["peft"]))
    assert count == META["llama"]["matched"]
    modules = dict(model.named_modules())
    with torch.no_grad():
        for (module, factor), tensor in golden_factors().items():
            getattr(modules[module], factor).weight.copy_(tensor)
    return model, data


def test_loss_logits_and_gradients_are_nemos():
    model, data = adapted_llama()
    out = model(input_ids=data["input_ids"], labels=data["input_ids"])
    torch.testing.assert_close(out.loss, data["loss"])
    torch.testing.assert_close(out.logits, data["logits"], rtol=1e-5, atol=1e-6)
    out.loss.backward()
    modules, seen = dict(model.named_modules()), set()
    for key, want in data.items():
        if key.startswith("grad."):
            module, factor = key.removeprefix("grad.").removesuffix(".weight").rsplit(".", 1)
            param = getattr(modules[module], factor).weight
            torch.testing.assert_close(param.grad, want, rtol=1e-4, atol=1e-6)
            seen.add(id(param))
    assert seen == {id(param) for param in veneer.trainable(model)}
    assert len(seen) == len(META["llama"]["trainable"])


def test_merged_weights_are_nemos():
    model, data = adapted_llama()
    veneer.merge(model)
    state = model.state_dict()
    for key, want in data.items():
        if key.startswith("merged."):
            torch.testing.assert_close(state[key.removeprefix("merged.")], want, rtol=1e-6, atol=1e-7)


def test_every_base_name_stays():
    model, _ = golden_llama()
    names = {name: id(param) for name, param in model.named_parameters()}
    apply_lora_to_linear_modules(model, PeftConfig(target_modules="*_proj"))
    assert names.items() <= {name: id(param) for name, param in model.named_parameters()}.items()


def test_the_base_is_frozen_unless_it_is_not_to_be():
    for skip in (False, True):
        model = Toy()
        model.fc.weight.requires_grad_(False)
        apply_lora_to_linear_modules(model, PeftConfig(target_modules=["layers.*q_proj"]), skip_freeze=skip)
        ours = {id(p) for p in veneer.trainable(model)}
        base = {name for name, p in model.named_parameters() if p.requires_grad and ".adapters." not in f".{name}"}
        assert len(ours) == (4 if not skip else 4 + len(base))
        assert ("emb.weight" in base) is skip
        assert "fc.weight" not in base


def test_use_triton_decides_the_class():
    model = Toy()
    apply_lora_to_linear_modules(model, PeftConfig(target_modules=["fc"], use_triton=True))
    assert isinstance(model.fc, TritonLinearLoRA)
    model = Toy()
    apply_lora_to_linear_modules(model, PeftConfig(target_modules=["fc"]))
    assert isinstance(model.fc, LinearLoRA)
    assert not isinstance(model.fc, TritonLinearLoRA)


def test_seeds():
    def first(manual, **options):
        torch.manual_seed(manual)
        model = Toy()
        apply_lora_to_linear_modules(model, PeftConfig(target_modules=["fc", "xq_proj"]), **options)
        return model.fc.lora_A.weight, model.xq_proj.lora_A.weight

    torch.manual_seed(1)
    assert torch.equal(first(0, seed=5)[0], first(0, seed=5)[0])
    assert not torch.equal(first(0, seed=5)[0], first(0, seed=6)[0])
    assert not torch.equal(*first(0))


def test_torch_manual_seed_decides_without_one():
    def first(manual):
        model = Toy()
        torch.manual_seed(manual)
        apply_lora_to_linear_modules(model, PeftConfig(target_modules=["fc"]))
        return model.fc.lora_A.weight

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_packed_meta_and_bf16_models():
    model = Toy()
    veneer.quantize(model, "nf4", targets="fc")
    apply_lora_to_linear_modules(model, PeftConfig(target_modules=["fc"]), quantization_config={"anything": 1})
    assert isinstance(model.fc, LinearLoRA)
    with torch.device("meta"):
        model = Toy()
    apply_lora_to_linear_modules(model, PeftConfig(target_modules=["fc"]))
    assert model.fc.lora_A.weight.is_meta
    model = Toy().to(torch.bfloat16)
    apply_lora_to_linear_modules(model, PeftConfig(target_modules=["fc"]))
    assert model.fc.lora_A.weight.dtype == torch.bfloat16


def test_a_second_time_is_an_error_that_leaves_the_model():
    model = Toy()
    config = PeftConfig(target_modules=["fc"])
    apply_lora_to_linear_modules(model, config)
    before = set(model.state_dict())
    with pytest.raises(VeneerError, match=r"this model has LoRA already \(adapter 'default'\)"):
        apply_lora_to_linear_modules(model, PeftConfig(target_modules=["xq_proj"]))
    assert set(model.state_dict()) == before
    apply_lora_to_linear_modules(model, PeftConfig(target_modules=["xq_proj"]), name="other")
    assert isinstance(model.xq_proj, LinearLoRA)


def test_a_layer_with_a_forward_of_its_own_is_adapted_by_its_weight():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict({"fc": Doubling(4, 3)})
    assert apply_lora_to_linear_modules(model, PeftConfig(match_all_linear=True, dim=2)) == 1
    assert set(adapters(model)["default"].weights) == {"fc"}


# -- experts ------------------------------------------------------------------------------------------------
def expert_methods(model):
    return {name: adapter.method for name, adapter in adapters(model)["default"].weights.items()}


def test_experts_get_adapters_of_their_own():
    model = Experts()
    count = apply_lora_to_linear_modules(model, PeftConfig(target_modules=["experts", "router"], dim=4, alpha=8))
    assert count == 2
    assert expert_methods(model) == {"experts.up": LoRA(rank=4, alpha=8, init="xavier", dropout_on="output"),
                                     "router": LoRA(rank=4, alpha=8, init="xavier", dropout_on="output")}
    assert adapters(model)["default"].weights["experts.up"].A.shape == (3, 4, 6)


def test_moe_rank_scaling_divides_the_rank_of_experts():
    model = Experts()
    apply_lora_to_linear_modules(model, PeftConfig(target_modules=["experts", "router"], dim=4, alpha=8,
                                                   moe_rank_scaling=True))
    methods = expert_methods(model)
    assert (methods["experts.up"].rank, methods["router"].rank) == (2, 4)
    assert (methods["experts.up"].scale, methods["router"].scale) == (4.0, 2.0)


@pytest.mark.parametrize(("given", "warns", "message"), [
    ({"dim": 5, "moe_rank_scaling": True}, True,
     "dim=5 is no multiple of num_experts_per_tok=2; experts get a rank of 2"),
    ({"dim": 1, "moe_rank_scaling": True}, False, "dim=1 is less than num_experts_per_tok=2"),
    ({"dropout": 0.1}, True, r"dropout=0.1 is not applied to experts, as in NeMo \('experts.up'\)"),
    ({"use_dora": True}, False, "use_dora=True is for linear layers only, as in NeMo, and 'experts.up' holds stacked"),
])
def test_what_experts_cannot_have(given, warns, message):
    model, config = Experts(), PeftConfig(target_modules=["experts"], **given)
    with pytest.warns(VeneerWarning, match=message) if warns else pytest.raises(VeneerError, match=message):
        apply_lora_to_linear_modules(model, config)


def test_moe_rank_scaling_where_it_means_nothing():
    with pytest.warns(VeneerWarning, match="moe_rank_scaling=True has no effect: no stacked experts are among"):
        apply_lora_to_linear_modules(Experts(), PeftConfig(target_modules=["router"], moe_rank_scaling=True))
    model = Experts()
    del model.config
    with pytest.raises(VeneerError, match="config does not say how many: none of n_activated_experts"):
        apply_lora_to_linear_modules(model, PeftConfig(target_modules=["experts"], moe_rank_scaling=True))


def test_importing_it_brings_no_optional_library():
    code = ("import sys, torch\n"
            "before = set(sys.modules)\n"
            "import veneer.nemo\n"
            "optional = {'transformers', 'pydantic', 'triton', 'bitsandbytes', 'torchao', 'peft'}\n"
            "print(sorted(optional & (set(sys.modules) - before)))")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
