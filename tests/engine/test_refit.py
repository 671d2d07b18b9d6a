"""replace_lora_weights_loftq: LoRA refitted to a base that is quantised already."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import veneer
from veneer import DoRA, Full, LoRA
from veneer.inits import LoftQ
from veneer.method import VeneerError
from veneer.refit import replace_lora_weights_loftq


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(64, 10)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.05 * torch.randn(p.shape, generator=g))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


UP = "layers.0.up"


def quantised(rules=None, seed=0, **options):
    """A model whose four inner weights are NF4, with LoRA on them, and the tensors it had."""
    model = Net(seed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    veneer.quantize(model, "nf4", "layers.*", **options)
    veneer.attach(model, rules or {"layers.*": LoRA(rank=8, alpha=24)})
    return model, before


def adapter(model, name=UP):
    return model.get_submodule(name).adapters["default"]["weight"]


def change(one):
    return one.scale * one.B.detach() @ one.A.detach()


def pairs(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "adapters" in name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def refused(model, originals, said, **options):
    """The call fails with these words, and every pair is as it was."""
    before = pairs(model)
    with pytest.raises(VeneerError, match=said):
        replace_lora_weights_loftq(model, originals, **options)
    assert same(pairs(model), before)


# -- what it does -------------------------------------------------------------------------------------------
def test_each_pair_is_the_nearest_to_what_is_missing():
    model, before = quantised()
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(1))
    true, plain = Net()(x).detach(), model(x).detach()
    report = replace_lora_weights_loftq(model, before)
    for name in (UP, "layers.1.down"):
        missing = before[f"{name}.weight"] - model.get_submodule(name).read()
        U, S, Vh = torch.linalg.svd(missing)
        assert torch.allclose(change(adapter(model, name)), U[:, :8] * S[:8] @ Vh[:8], atol=1e-6)
        (row,) = [each for each in report.weights if each.name == name]
        assert row.before == pytest.approx(float(missing.norm()), rel=1e-4)
        assert row.after == pytest.approx(float((missing - change(adapter(model, name))).norm()), rel=1e-4)
    assert report.replaced == ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
    assert report.left == {}
    assert report.error_after < 0.9 * report.error_before
    assert (model(x) - true).norm() < 0.9 * (plain - true).norm()
    assert "4 of 4 LoRA weights refitted: distance to the originals" in str(report)


def test_it_does_on_a_quantised_base_what_loftq_does_by_itself():
    model, before = quantised(double=False)
    replace_lora_weights_loftq(model, before)
    other = veneer.attach(Net(), {"layers.*": LoRA(rank=8, alpha=24, init=LoftQ())})
    assert torch.allclose(change(adapter(model)), change(adapter(other)), atol=1e-6)
    assert torch.equal(model.layers[0].up.read(), other.layers[0].up.read())


def test_a_dense_base_that_was_rounded():
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.layers[0].up.weight.mul_(40).round_().div_(40)
    veneer.attach(model, {"layers.*": LoRA(rank=8)})
    report = replace_lora_weights_loftq(model, before)
    assert report.replaced == [UP]
    others = ["layers.0.down", "layers.1.up", "layers.1.down"]
    assert report.left == dict.fromkeys(others, "its base holds the original values")
    assert not adapter(model, "layers.0.down").B.any()


def test_a_16_bit_base_and_originals_on_two_precisions():
    model = Net().bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    veneer.quantize(model, "nf4", "layers.*")
    veneer.attach(model, {"layers.*": LoRA(rank=8)})
    report = replace_lora_weights_loftq(model, before)
    assert report.error_after < 0.9 * report.error_before
    assert adapter(model).A.dtype == torch.float32


def test_stacked_and_convolved_weights():
    model = nn.ModuleDict({"conv": nn.Conv2d(8, 12, 3)})
    model.experts = nn.Parameter(torch.randn(3, 16, 20))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20).round_().div_(20)
    veneer.attach(model, {"conv": LoRA(rank=4), "experts": LoRA(rank=4)})
    report = replace_lora_weights_loftq(model, before)
    assert len(report.replaced) == 2
    for row in report.weights:
        assert 0 < row.after < 0.95 * row.before


def test_a_second_call_changes_nothing_and_a_trained_pair_is_replaced():
    model, before = quantised()
    replace_lora_weights_loftq(model, before)
    once = pairs(model)
    with torch.no_grad():
        adapter(model).B.add_(1.0)
    report = replace_lora_weights_loftq(model, before)
    assert same(pairs(model), once)
    assert report.weights[0].after < report.weights[0].before


# -- accept -------------------------------------------------------------------------------------------------
def test_only_what_is_accepted_is_replaced():
    model, before = quantised()
    start, seen = pairs(model), []

    def accept(given, name):
        assert given is model
        seen.append(name)
        assert adapter(model, name).B.any()  # the new pair is in place
        return name.endswith("up")

    report = replace_lora_weights_loftq(model, before, accept=accept)
    assert seen == ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
    assert report.replaced == ["layers.0.up", "layers.1.up"]
    now = pairs(model)
    assert all(torch.equal(tensor, start[key]) == (".down." in key) for key, tensor in now.items())
    downs = [row for row in report.weights if row.name.endswith("down")]
    assert all(row.after < row.before for row in downs)  # what was refused would have been nearer
    expected = sum((r.after if r.replaced else r.before) ** 2 for r in report.weights) ** 0.5
    assert report.error_after == pytest.approx(expected)


def test_a_metric_of_the_users_never_gets_worse():
    model, before = quantised()
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(1))
    true = Net()(x).detach()

    def error():
        with torch.no_grad():
            return float((model(x) - true).norm())

    best = first = error()

    def accept(_, name):
        nonlocal best
        better = error() < best
        best = min(best, error())
        return better

    report = replace_lora_weights_loftq(model, before, accept=accept)
    assert report.replaced
    assert error() == pytest.approx(best)
    assert error() < first


def test_what_accept_raises_puts_everything_back():
    model, before = quantised()
    start = pairs(model)

    def accept(_, name):
        if name == "layers.1.up":
            raise RuntimeError("mine")
        return True

    with pytest.raises(RuntimeError, match="mine"):
        replace_lora_weights_loftq(model, before, accept=accept)
    assert same(pairs(model), start)


def test_an_accept_that_forgets_to_answer():
    model, before = quantised()
    refused(model, before, "accept returned None for 'layers.0.up'; it must return True", accept=lambda *_: None)


# -- where the originals lie --------------------------------------------------------------------------------
def test_a_file_a_folder_and_shards_give_the_same(tmp_path):
    model, before = quantised()
    expected = copy.deepcopy(model)
    replace_lora_weights_loftq(expected, before)
    save_file(before, tmp_path / "model.safetensors")
    (tmp_path / "shards").mkdir()
    names = sorted(before)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: before[name] for name in own}, tmp_path / "shards" / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    for source in (tmp_path / "model.safetensors", str(tmp_path), tmp_path / "shards"):
        found = copy.deepcopy(model)
        replace_lora_weights_loftq(found, source)
        assert same(pairs(found), pairs(expected)), source


@pytest.mark.parametrize("longer", [True, False])
def test_names_may_have_another_prefix(tmp_path, longer):
    model, before = quantised()
    expected = copy.deepcopy(model)
    replace_lora_weights_loftq(expected, before)
    if longer:
        renamed = {f"model.{name}": tensor for name, tensor in before.items()}
        replace_lora_weights_loftq(model, renamed)
        assert same(pairs(model), pairs(expected))
    else:
        whole = nn.Module()
        whole.backbone = Net()
        veneer.quantize(whole, "nf4", "backbone.layers.*")
        veneer.attach(whole, {"backbone.layers.*": LoRA(rank=8, alpha=24)})
        replace_lora_weights_loftq(whole, before)
        assert torch.allclose(change(adapter(whole.backbone)), change(adapter(expected)), atol=1e-7)


def test_an_adapter_saved_in_the_same_folder_is_no_original(tmp_path):
    model, before = quantised()
    save_file(before, tmp_path / "model.safetensors")
    save_file({f"{UP}.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert len(replace_lora_weights_loftq(model, tmp_path).replaced) == 4


def test_only_the_files_that_the_index_names_count(tmp_path):
    model, before = quantised()
    expected = copy.deepcopy(model)
    replace_lora_weights_loftq(expected, before)
    save_file({name: -tensor for name, tensor in before.items()}, tmp_path / "model-old.safetensors")
    save_file(before, tmp_path / "part.safetensors")
    refused(model, tmp_path, "is in model-old.safetensors and in part.safetensors of .*, and no .* says which counts")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(before, "part.safetensors")}))
    replace_lora_weights_loftq(model, tmp_path)
    assert same(pairs(model), pairs(expected))
    where = {**dict.fromkeys(before, "part.safetensors"), "more": "lost.safetensors"}
    index.write_text(json.dumps({"weight_map": where}))
    refused(model, tmp_path, "lost.safetensors, which .*index.json names, is not there: the folder is not whole")


# -- what is left alone, what is refused --------------------------------------------------------------------
def test_other_methods_of_the_same_name_are_left_and_named():
    model, before = quantised({"layers.*": LoRA(rank=8), "head": Full()})
    report = replace_lora_weights_loftq(model, before)
    assert len(report.replaced) == 4
    assert report.left == dict.fromkeys(["head", "head.bias"], "it has Full(), and only LoRA's pair can be refitted")
    assert "left as it was: head: it has Full()" in str(report)


def test_no_lora_at_all():
    model, before = quantised({"layers.*": DoRA(LoRA(rank=8))})
    refused(model, before, r"'default' has no LoRA that could be refitted; 'layers.0.up': it has DoRA\(LoRA\(rank=8")


def test_a_start_that_is_subtracted_again_cannot_be_refitted():
    normal = "torch.nn.init.normal_"
    model, before = quantised({"layers.*": LoRA(rank=8, init={"init": "torch", "a": normal, "b": normal})})
    refused(model, before, "subtracts the pair it starts from; attach a LoRA that starts at zero, such as")


def test_an_unknown_name_a_merged_adapter_and_a_scale_of_zero():
    model, before = quantised()
    refused(model, before, "no adapter named 'defautl' on this model; did you mean 'default'?", name="defautl")
    veneer.merge(model)
    refused(model, before, r"adapter 'default' is merged into the base weights; call veneer.unmerge\(model\) first")
    model, before = quantised({"layers.*": LoRA(rank=8, alpha=0)})
    refused(model, before, "has a scale of 0")
    refused(Net(), before, "no adapter named 'default' on this model. It has: none")


def test_a_base_that_is_what_it_was():
    model = veneer.attach(Net(), {"layers.*": LoRA(rank=8)})
    refused(model, Net().state_dict(), r"the base holds its original values in all 4 weights.*veneer.quantize")


def test_originals_with_other_names():
    model, before = quantised()
    del before["layers.1.up.weight"]
    refused(model, before, r"the mapping given has no tensor 'layers.1.up.weight'; did you mean 'layers.\d.up.weight'\?"
            ".*are they of another model")


def test_originals_with_names_that_may_mean_two_things():
    model, before = quantised()
    twice = {f"{part}.{name}": tensor for name, tensor in before.items() for part in ("encoder", "decoder")}
    refused(model, twice, "'layers.0.up.weight' may be any of 'decoder.layers.0.up.weight', 'encoder.layers.0.up.weight"
            "'; give a mapping from the model's own names")


def test_originals_with_other_shapes():
    model, before = quantised()
    before["layers.1.down.weight"] = torch.zeros(64, 95)
    refused(model, before, r"'layers.1.down.weight' is \(64, 95\), and the model's weight is \(64, 96\)")


def test_originals_with_other_values():
    model, before = quantised()
    before["layers.1.down.weight"] = Net(seed=5).layers[1].down.weight.detach()
    refused(model, before, r"'layers.1.down.weight' has nothing in common with the weight that the model holds "
            r"\(a cosine of -?0.0\d\)")
    before["layers.1.down.weight"] = torch.full((64, 96), torch.nan)
    refused(model, before, "'layers.1.down.weight' holds NaN or infinite values")


def test_places_where_there_are_no_originals(tmp_path):
    model, _ = quantised()
    refused(model, tmp_path / "nowhere", "there is nothing at .*nowhere. Local paths are read, and nothing")
    (tmp_path / "config.json").write_text("{}")
    refused(model, tmp_path, "no safetensors file of a model in .*; it has: config.json.*: load the model, and give")
    refused(model, tmp_path / "config.json", "config.json is no .safetensors file, and only those can be read")
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    refused(model, tmp_path, r"model.safetensors \(9 bytes\) is no complete safetensors file")
    refused(model, 7, "must be a folder, a .safetensors file or a mapping from names to tensors, got int")
