"""Patterns → weights: who is hit, who wins, and what is said when nothing is."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import veneer
from veneer import DoRA, Full, LoRA, Rows
from veneer.method import VeneerError, VeneerWarning, method_from_dict, method_to_dict

from .nets import Net, tiny_llama

Q = [f"layers.{i}.q_proj" for i in range(3)]


def chosen(model, rules):
    return {entry.name: entry.method for entry in veneer.plan(model, rules).entries}


def refusal(model, rules):
    before = [type(m) for m in model.modules()]
    with pytest.raises(VeneerError) as caught:
        veneer.attach(model, rules)
    assert [type(m) for m in model.modules()] == before, "a refused attach touched the model"
    assert all(p.requires_grad for p in model.parameters())
    return str(caught.value)


def test_star_matches_across_dots_and_later_patterns_win():
    found = chosen(Net(), {"layers.*": LoRA(rank=2), "*.q_proj": LoRA(rank=5), "layers.*.down": None})
    assert found == {**{f"layers.{i}.{n}": LoRA(rank=r) for i in range(3) for n, r in (("q_proj", 5), ("up", 2))}}
    found = chosen(Net(), {"*.q_proj": LoRA(rank=5), "layers.*": LoRA(rank=2)})
    assert found["layers.0.q_proj"] == LoRA(rank=2)


def test_a_dot_is_a_dot_and_a_name_must_match_whole():
    model = nn.ModuleDict({"a1b": nn.Linear(2, 2), "c": nn.ModuleDict({"q": nn.Linear(2, 2), "q2": nn.Linear(2, 2)})})
    assert list(chosen(model, {"c.q": LoRA()})) == ["c.q"]
    assert "no adaptable weight matches 'a.b'" in refusal(model, {"a.b": LoRA()})
    assert "no adaptable weight matches 'q'" in refusal(model, {"q": LoRA()})
    layers = nn.Sequential(*(nn.Linear(2, 2) for _ in range(13)))
    with pytest.warns(VeneerWarning, match="1 of 13"):
        assert list(chosen(layers, {"1": LoRA()})) == ["1"]  # and not 10, 11, 12


def test_parameter_and_module_name_are_the_same_weight():
    model = Net()
    assert chosen(model, {"*.q_proj.weight": LoRA()}) == chosen(model, {"*.q_proj": LoRA()})
    assert chosen(model, {"*.q_proj": LoRA(rank=2), "*.q_proj.weight": None, "*.up": LoRA()}).keys() == {
        f"layers.{i}.up" for i in range(3)}


def test_regex_must_match_the_whole_name():
    model = Net()
    assert list(chosen(model, {re.compile(r"layers\.\d\.q_proj"): LoRA()})) == Q
    message = refusal(model, {re.compile("q_proj"): LoRA()})
    assert "no adaptable weight matches 'q_proj'" in message
    assert "a regex must match the whole name" in message


def test_callables_get_name_and_module():
    seen = []

    def wide(name, module):
        seen.append((name, type(module)))
        return isinstance(module, nn.Linear) and module.out_features == 16

    model = Net()
    assert list(chosen(model, {wide: LoRA()})) == [f"layers.{i}.up" for i in range(3)]
    assert ("embed", nn.Embedding) in seen
    with pytest.raises(VeneerError, match="no adaptable weight matches 'nothing'"):
        veneer.plan(model, {nothing: LoRA()})
    with pytest.raises(VeneerError, match=r"a pattern is a string, a compiled regex or a callable .*got 3"):
        veneer.plan(model, {3: LoRA()})


def nothing(name, module):
    return False


@pytest.mark.parametrize("tied", [False, True])
def test_a_bare_method_is_every_linear_but_the_head(tied):
    made = veneer.plan(Net(tied=tied), LoRA(rank=2))
    names = [entry.name for entry in made.entries]
    assert names == [f"layers.{i}.{n}" for i in range(3) for n in ("q_proj", "up", "down")]
    llama = tiny_llama(tied=tied)
    assert len(veneer.plan(llama, LoRA()).entries) == 14
    assert not any("lm_head" in e.name or "embed" in e.name for e in veneer.plan(llama, LoRA()).entries)


def test_a_head_is_found_by_what_the_model_says():
    llama = tiny_llama()
    llama.config.tie_word_embeddings = False
    odd = nn.Linear(16, 29, bias=False)
    llama.set_output_embeddings(odd)
    assert "lm_head" not in {entry.name for entry in veneer.plan(llama, LoRA()).entries}


def test_a_model_of_nothing_but_a_head():
    message = refusal(nn.ModuleDict({"lm_head": nn.Linear(3, 3)}), LoRA())
    assert "no linear weight besides its output head" in message
    assert "{pattern: method}" in message


@pytest.mark.parametrize(("pattern", "near"), [
    ("q_porj", "layers.0.q_proj"), ("*.q_porj", "layers.0.q_proj"), ("layers.*.dwn", "layers.0.down"),
    ("lm_haed", "lm_head"), ("embedd", "embed"),
])
def test_a_misspelt_pattern_names_the_nearest(pattern, near):
    message = refusal(Net(), {pattern: LoRA()})
    assert f"no adaptable weight matches {pattern!r}" in message
    assert f"nearest: {near!r}" in message
    assert "Adaptable here: 11 weights" in message


def test_a_misspelt_pattern_beside_good_ones():
    assert "'*.dwon'" in refusal(Net(), {"*.q_proj": LoRA(), "*.dwon": LoRA()})
    assert "'*.dwon'" in refusal(Net(), {"*": LoRA(), "*.dwon": None})  # an exclusion that excludes nothing too


def test_nothing_near_still_says_what_there_is():
    message = refusal(Net(), {"xyzzy": LoRA()})
    assert "nearest" not in message
    assert "'embed', 'layers.0.q_proj', 'layers.0.up'" in message


def test_vectors():
    model = Net()
    assert len(chosen(model, {"*": LoRA()})) == 11  # biases and norms are passed by
    message = refusal(model, {"*.norm": LoRA()})
    assert "'*.norm' matches only vectors" in message
    assert "use Full()" in message
    found = chosen(model, {"*.norm": Full()})
    assert set(found) == {f"layers.{i}.norm{tail}" for i in range(3) for tail in ("", ".bias")}
    assert set(chosen(model, {"*.up.bias": Full()})) == {f"layers.{i}.up.bias" for i in range(3)}


def test_a_linear_of_one_input_is_a_matrix():
    model = nn.ModuleDict({"time": nn.Linear(1, 6), "out": nn.Linear(6, 1)})
    assert set(chosen(model, LoRA(rank=1))) == {"time", "out"}


def test_full_takes_the_bias_along_unless_a_rule_speaks_of_it():
    model = Net()
    assert set(chosen(model, {"*.up": Full()})) == {f"layers.{i}.up{t}" for i in range(3) for t in ("", ".bias")}
    assert set(chosen(model, {"*.up": Full(), "*.bias": None})) == {f"layers.{i}.up" for i in range(3)}
    found = chosen(model, {"*.up": Full(), "*.up.bias": Full(dtype=torch.float64)})
    assert found["layers.0.up.bias"] == Full(dtype=torch.float64)
    assert set(chosen(model, {"*.up": LoRA()})) == {f"layers.{i}.up" for i in range(3)}


def test_uneven_coverage_is_warned_of():
    model = Net()
    with pytest.warns(VeneerWarning) as caught:
        made = veneer.plan(model, {"layers.0.q_proj": LoRA(), "layers.2.q_proj": LoRA()})
    text = str(caught[0].message)
    assert len(caught) == 1
    assert "2 of 3 weights named 'layers.#.q_proj' are adapted; not 'layers.1.q_proj'" in text
    assert "a rule with None says that this is meant" in text
    assert f"warning: {text}" in str(made)
    veneer.plan(model, {"*.q_proj": LoRA(), "layers.1.q_proj": None})  # meant: an error here would be a warning


def test_weights_whose_own_names_end_in_a_number_are_not_alike():
    layer = nn.ModuleDict({"fc1": nn.Linear(2, 2), "fc2": nn.Linear(2, 2)})
    assert list(chosen(layer, {"fc1": LoRA()})) == ["fc1"]  # a warning here would be an error


def test_warnings_tell_of_the_caller():
    with pytest.warns(VeneerWarning) as caught:
        veneer.plan(Net(), {"layers.0.q_proj": LoRA()})
    assert caught[0].filename == __file__
    with pytest.warns(VeneerWarning) as caught:
        veneer.attach(Net(), {"layers.0.q_proj": LoRA()})
    assert caught[0].filename == __file__


def test_rules_that_adapt_nothing():
    assert "adapt nothing" in refusal(Net(), {"*.q_proj": None})
    assert "adapt nothing" in refusal(Net(), {"*.q_proj": LoRA(), "*": None})
    assert "non-empty mapping" in refusal(Net(), {})
    assert "non-empty mapping" in refusal(Net(), "lora")
    message = refusal(Net(), {"*.q_proj": "lora"})
    assert "rule '*.q_proj': expected a method such as LoRA(rank=8) or None, got 'lora'" in message


def test_tied_weights_are_one_and_must_agree():
    model = Net(tied=True)
    assert list(chosen(model, {"embed": LoRA()})) == ["embed"]
    assert list(chosen(model, {"lm_head": LoRA()})) == ["embed"]
    assert list(chosen(model, {"embed": LoRA(), "lm_head": LoRA()})) == ["embed"]
    message = refusal(model, {"embed": LoRA(rank=2), "lm_head": LoRA(rank=3)})
    assert "'embed' and 'lm_head' are one tensor, and the rules disagree" in message
    assert "rank=2" in message
    assert "rank=3" in message
    assert "untie them first" in message
    assert "disagree" in refusal(model, {"embed": LoRA(), "lm_head": None})
    assert "disagree" in refusal(Net(tied=True), {"*": LoRA(), "lm_head": None})


def test_tied_tensors_stay_tied_and_share_the_adapter():
    model = veneer.attach(Net(tied=True), {"embed": LoRA(rank=2)})
    assert model.embed.weight is model.lm_head.weight
    assert model.embed.adapters["default"]["weight"] is model.lm_head.adapters["default"]["weight"]
    assert len(veneer.trainable(model)) == 2


def test_the_table():
    made = veneer.plan(Net(), {"*.q_proj": LoRA(rank=2), "*.up": DoRA(LoRA(rank=4, alpha=8)), "*.down": None})
    lines = str(made).splitlines()
    assert lines[0].split() == ["pattern", "weights", "method", "trainable"]
    assert set(lines[1]) <= {"-", " "}
    assert lines[2].split() == ["*.q_proj", "3", "LoRA(rank=2)", "96"]
    assert lines[3].startswith("*.up")
    assert "DoRA(LoRA(rank=4, alpha=8))" in lines[3]
    per_up = 4 * (8 + 16) + 16
    assert lines[3].endswith(f" {3 * per_up}")
    assert made.trainable_parameters == 96 + 3 * per_up
    base = sum(p.numel() for p in Net().parameters())
    assert f"({100 * made.trainable_parameters / base:.3f}% of the base's {base:,})" in lines[4]
    assert lines[5] == "left alone: layers.0.down, layers.1.down, layers.2.down"


def test_the_count_is_what_attach_makes():
    model = Net()
    rules = {"*.q_proj": LoRA(rank=2, bias=True), "*.up": DoRA(LoRA(rank=4)), "*.down": Full(), "embed": Rows([3, 1])}
    made = veneer.plan(model, rules)
    veneer.attach(model, made)
    assert made.trainable_parameters == sum(p.numel() for p in veneer.trainable(model))


def test_planning_touches_nothing():
    model = Net()
    before = (list(model.state_dict()), [type(m) for m in model.modules()], torch.get_rng_state())
    veneer.plan(model, {"*": LoRA()})
    assert before[:2] == (list(model.state_dict()), [type(m) for m in model.modules()])
    assert torch.equal(before[2], torch.get_rng_state())


def test_settings_without_effect_are_refused():
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    message = refusal(attention, {"attn.in_proj_weight": LoRA(dropout=0.1)})
    assert "LoRA cannot adapt 'attn.in_proj_weight'" in message
    assert "no input to drop from; use dropout=0" in message
    assert "use dropout=0" in refusal(attention, {"attn.in_proj_weight": DoRA(LoRA(dropout=0.1))})
    assert "use bias=False" in refusal(Net(), {"embed": LoRA(bias=True)})
    assert "use bias=False" in refusal(Net(), {"embed": DoRA(LoRA(bias=True))})
    assert "max_norm" in refusal(nn.ModuleDict({"e": nn.Embedding(5, 4, max_norm=1.0)}), {"e": LoRA()})
    assert "row 13 does not exist: the weight has 13 rows" in refusal(Net(), {"embed": Rows([2, 13])})


def test_what_is_not_dense_is_refused_by_name():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(VeneerError, match=r"'b' is stored as Parameter of torch.int8.*load the model dequantised"):
        veneer.plan(model, LoRA())


@pytest.mark.parametrize(("make", "words"), [
    (lambda: LoRA(rank=0), "rank must be a whole number of at least 1, got 0"),
    (lambda: LoRA(rank=2.0), "rank must be a whole number"),
    (lambda: LoRA(rank=True), "rank must be a whole number"),
    (lambda: LoRA(dropout=1.0), "dropout must be at least 0 and below 1, got 1.0"),
    (lambda: LoRA(dropout=float("nan")), "dropout"),
    (lambda: LoRA(alpha=float("inf")), "alpha must be a finite number"),
    (lambda: LoRA(init="kaimin"), "unknown init 'kaimin'; did you mean 'kaiming'?"),
    (lambda: DoRA(DoRA(LoRA())), "wraps an additive method"),
    (lambda: DoRA(Full()), "Full is not one"),
    (lambda: DoRA(8), "DoRA wraps a method: DoRA(LoRA(rank=8)); got 8"),
    (lambda: Rows([]), "distinct row numbers"),
    (lambda: Rows([1, 1]), "distinct row numbers"),
    (lambda: Rows([-1]), "distinct row numbers"),
    (lambda: method_from_dict({"method": "lroa"}), "unknown method 'lroa'; did you mean 'lora'?"),
    (lambda: method_from_dict({"method": "lora", "rnak": 3}), "no option 'rnak'; did you mean 'rank'?"),
    (lambda: method_from_dict({"rank": 3}), "a method needs a key 'method'"),
    (lambda: method_from_dict({"method": "lora", "dtype": "float23"}), "unknown dtype 'float23'"),
])
def test_bad_methods_say_why(make, words):
    with pytest.raises(VeneerError) as caught:
        make()
    assert words in str(caught.value)


def test_dora_does_not_wrap_what_replaces_the_weight():
    with pytest.raises(VeneerError, match="Rows is not one"):
        DoRA(Rows([1]))


@pytest.mark.parametrize("method", [
    LoRA(), LoRA(rank=3, alpha=2.5, rank_stabilized=True, dropout=0.1, dtype=torch.bfloat16, init="xavier", bias=True),
    DoRA(LoRA(rank=2)), Full(dtype=torch.float16), Rows([5, 2])])
def test_methods_go_to_dicts_and_back(method):
    assert method_from_dict(method_to_dict(method)) == method
    assert hash(method_from_dict(method_to_dict(method))) == hash(method)


def test_methods_are_keyword_only_and_frozen():
    with pytest.raises(TypeError):
        LoRA(8)
    with pytest.raises(AttributeError):
        LoRA().rank = 3
