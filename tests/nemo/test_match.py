"""Which modules are meant, against NeMo's own table; exceptions are those of docs/coming-from-nemo.md."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import veneer
from veneer.method import VeneerError, VeneerWarning
from veneer.nemo import ModuleMatcher, PeftConfig, apply_lora_to_linear_modules, wildcard_match
from veneer.nemo.linear import LinearLoRA

from .nets import META, Toy, ToyForCausalLM

#: patterns that hit other names here, because a dot is a dot, and `.*` is the regex it is elsewhere
DIFFER = {"*.q_proj": ["layers.0.q_proj", "layers.1.q_proj"], ".*fc.*": ["fc"]}
#: the same for single names: NeMo says the opposite
OPPOSITE = {("*.q_proj", "mq_proj"), (".*fc.*", "fc"), ("a.b", "axb"), *(("*.*.*", key) for key in (
    "m.q_proj", "q_proj", "mq_proj", "fc", "xfcx", "a.b", "axb", "cab"))}


def adapted(model):
    return [name for name, module in model.named_modules() if isinstance(module, LinearLoRA)]


@pytest.mark.parametrize("row", META["matcher"], ids=lambda row: f"{row['kwargs']}-{row['causal_lm']}")
@pytest.mark.filterwarnings("ignore::veneer.method.VeneerWarning")
def test_the_table(row):
    model, config = (ToyForCausalLM if row["causal_lm"] else Toy)(), PeftConfig(dim=2, **row["kwargs"])
    if "error" in row:
        with pytest.raises(VeneerError):
            apply_lora_to_linear_modules(model, config)
        assert not adapted(model)
        return
    targets = row["kwargs"].get("target_modules")
    want = DIFFER.get(targets[0] if isinstance(targets, list) else "", row.get("modules", []))
    assert apply_lora_to_linear_modules(model, config) == len(want)
    assert adapted(model) == want


@pytest.mark.parametrize(("pattern", "key", "hit"), META["wildcard"])
def test_single_names(pattern, key, hit):
    assert wildcard_match(pattern, key) is (hit != ((pattern, key) in OPPOSITE))


@pytest.mark.parametrize(("pattern", "key", "hit"), [
    ("*.layers.1.*", "model.layers.1.mlp.up", True), ("*.layers.1.*", "model.layers.12.mlp.up", False),
    ("*.layers.1*", "model.layers.12.mlp.up", True), ("layers.[01].q", "layers.1.q", True),
    ("layers.[01].q", "layers.2.q", False), ("*(q|o)_proj", "a.b.o_proj", True),
    (r"layers\.\d+\.q", "layers.17.q", True),
    ("fc|q", "fc1", False), ("a.*", "a.b.c", True), ("a.*", "ab", False), ("", "", True), ("x", None, None)])
def test_patterns(pattern, key, hit):
    assert wildcard_match(pattern, key) is hit


def test_a_broken_regex_is_named():
    with pytest.raises(VeneerError, match=r"'\*\(q_proj' is no regular expression"):
        wildcard_match("*(q_proj", "q_proj")


def test_match_takes_name_and_prefix_as_nemo_does():
    matcher = ModuleMatcher(target_modules="*.q_proj", is_causal_lm=True)
    assert matcher.match(nn.Linear(2, 2), "q_proj", "layers.0")
    assert not matcher.match(nn.Linear(2, 2), "q_proj")
    assert not ModuleMatcher(match_all_linear=True, is_causal_lm=True).match(nn.Linear(2, 2), "lm_head", "model")


def test_what_is_said_for_bad_requests():
    for given, message in [
        ({}, "nothing says what to adapt: give target_modules, exclude_modules or match_all_linear=True"),
        ({"target_modules": ["fc"], "exclude_modules": ["q"]}, "cannot be given together"),
        ({"target_modules": 3}, "target_modules must be a string or a list of strings, got 3"),
        ({"exclude_modules": ["a", None]}, "exclude_modules must be a string or a list"),
    ]:
        with pytest.raises(VeneerError, match=message):
            ModuleMatcher(**given)
    with pytest.raises(VeneerError, match="hit 'emb', a Embedding, which is no linear layer"):
        apply_lora_to_linear_modules(Toy(), PeftConfig(target_modules="*emb"))


def test_what_is_passed_over_is_said():
    with pytest.warns(VeneerWarning, match="match_all_linear=True adapts every linear layer; exclude_modules is not"):
        ModuleMatcher(match_all_linear=True, exclude_modules="fc")
    model = Toy()
    before = {name: param.requires_grad for name, param in model.named_parameters()}
    with pytest.warns(VeneerWarning, match=r"matches none of this model's 7 linear layers; nearest: "
                                           r"'layers.\d.q_proj'. A pattern matches whole names: '\*q_proj'"):
        assert apply_lora_to_linear_modules(model, PeftConfig(target_modules=["q_proj"])) == 0
    assert {name: param.requires_grad for name, param in model.named_parameters()} == before
    with pytest.warns(VeneerWarning, match="the lm_head of a causal language model is left alone"):
        apply_lora_to_linear_modules(ToyForCausalLM(), PeftConfig(target_modules=["lm_head"]))


def test_layers_of_other_kinds_that_are_linear_match_too():
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"conv1d": Conv1D(4, 6), "linear": nn.Linear(6, 4), "conv": nn.Conv2d(3, 4, 2)})
    veneer.quantize(model, "nf4", targets="linear")
    assert apply_lora_to_linear_modules(model, PeftConfig(match_all_linear=True)) == 2
    assert torch.equal(model["conv1d"](torch.ones(1, 6)), veneer.detach(model)["conv1d"](torch.ones(1, 6)))
