"""Starts that rewrite base weights: tied ones, all or none, what is held, and the base they are loaded onto."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

import veneer
from veneer import LoRA
from veneer.inits import LoftQ
from veneer.io.store import read
from veneer.method import VeneerError, VeneerWarning
from veneer.methods.lora import LoRAAdapter
from veneer.storage import packed
from veneer.storage.packed import PackedLinear

RULE = LoRA(rank=2, init="loftq")


class Net(nn.Module):
    def __init__(self, tied: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(12, 16)
        self.one, self.two, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 12, bias=False)
        if tied:
            self.two.weight, self.head.weight = self.one.weight, self.table.weight

    def forward(self, ids):
        return self.head(self.two(torch.relu(self.one(self.table(ids)))))


IDS = torch.arange(12).reshape(3, 4)


# -- tied weights -------------------------------------------------------------------------------------------
def test_a_tied_weight_stays_one(tmp_path):
    model = Net(tied=True)
    with pytest.warns(VeneerWarning, match="'one': .*held as ordinary numbers: it is tied") as caught:
        veneer.attach(model, {"one": RULE, "table": RULE})
    assert [w.filename for w in caught] == [__file__]
    assert model.one.weight is model.two.weight
    assert model.table.weight is model.head.weight
    assert not torch.equal(model.one.weight, Net(tied=True).one.weight)
    assert not torch.equal(model.table.weight, Net(tied=True).table.weight)
    with torch.no_grad():
        model.one.adapters["default"]["weight"].B.add_(0.1)
    veneer.save(model, tmp_path)
    other = Net(tied=True)
    with pytest.warns(VeneerWarning, match="it is tied"):
        veneer.load(other, tmp_path)
    assert other.one.weight is other.two.weight
    assert torch.equal(other(IDS), model(IDS))


def test_a_layer_with_an_adapter_on_its_bias_is_packed_all_the_same():
    model = Net()
    veneer.attach(model, {"one.bias": veneer.Full()}, name="first")
    veneer.attach(model, {"one": RULE}, name="second")
    want = veneer.attach(Net(), {"one": RULE})(IDS)
    assert isinstance(model.one, PackedLinear)
    veneer.activate(model, ["first", "second"])
    assert torch.equal(model(IDS), want)
    with torch.no_grad():
        model.one.adapters["first"]["bias"].weight.add_(1.0)
    assert not torch.equal(model(IDS), want)


# -- all or none --------------------------------------------------------------------------------------------
def test_where_one_weight_cannot_be_rewritten_none_is(monkeypatch):
    model = Net()
    before = copy.deepcopy(model.state_dict())
    owned = dict(model.named_parameters())
    install, calls = packed.install, []

    def failing(module, held):
        calls.append(install(module, held))
        if len(calls) == 2:
            raise MemoryError("no room")
        return calls[-1]

    monkeypatch.setattr(packed, "install", failing)
    rules = {"table": LoRA(rank=2, init="pissa", residual="base"), "one": RULE, "two": RULE}
    with pytest.raises(MemoryError, match="no room"):
        veneer.attach(model, rules)
    assert type(model.one) is type(model.two) is nn.Linear
    assert all(owned[name] is param for name, param in model.named_parameters())
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    monkeypatch.undo()
    veneer.attach(model, rules)


def test_no_new_base_is_held_in_fp32(monkeypatch):
    start, made = LoRAAdapter.start, []

    def noting(self, weight):
        assert all(matrix() is None for matrix in made)
        base = start(self, weight)
        made.append(weakref.ref(base.matrix))
        return base

    monkeypatch.setattr(LoRAAdapter, "start", noting)
    veneer.attach(Net().bfloat16(), {"one": RULE, "two": LoRA(rank=2, init=LoftQ(packed=False)), "head": RULE})
    assert len(made) == 3
    assert all(matrix() is None for matrix in made)


# -- the base it is loaded onto -----------------------------------------------------------------------------
def test_another_base_is_told_of_although_it_was_rewritten(tmp_path):
    model = veneer.attach(Net(), {"one": RULE})
    report = veneer.save(model, tmp_path)
    assert not any("could not be read" in note for note in report.notes)
    assert read(tmp_path, False).manifest.base["fingerprint"] == _plain_print(tmp_path / "plain")
    wrong = Net()
    with torch.no_grad():
        wrong.one.weight.mul_(1.1)
    with pytest.raises(VeneerError, match="base weight 'one' has other values than the one this adapter was trained"):
        veneer.load(wrong, tmp_path)
    for other in (Net(), model):  # a fresh base, and the model that has the adapter already
        veneer.load(other, tmp_path)
        assert torch.equal(other(IDS), model(IDS))


def _plain_print(path):
    veneer.save(veneer.attach(Net(), {"one": LoRA(rank=2)}), path)
    return read(path, False).manifest.base["fingerprint"]


@pytest.mark.filterwarnings("ignore:'one'. LoftQ. quantising changes nothing")
def test_a_packed_base_is_refused_unless_it_is_what_the_start_made(tmp_path):
    for name, init in (("first", LoftQ()), ("second", LoftQ(first="svd"))):
        model = veneer.attach(Net(), {"one": LoRA(rank=2, init=init)})
        veneer.save(model, tmp_path / name)
        other = Net()
        veneer.quantize(other, "nf4", ["one"], double=False)
        if name == "first":  # Q is the quantised weight itself
            veneer.load(other, tmp_path / name)
            assert torch.equal(other(IDS), model(IDS))
        else:
            says = r"'one' is held as nf4 \(read as float32\) here and was held as float32"
            with pytest.raises(VeneerError, match=says):
                veneer.load(other, tmp_path / name)


def test_a_model_without_values_cannot_begin_again(tmp_path):
    veneer.save(veneer.attach(Net(), {"one": RULE}), tmp_path)
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(VeneerError, match="'one' begins at the base weight, which is on the meta device"):
        veneer.load(empty, tmp_path)


# -- what starts have to say --------------------------------------------------------------------------------
def test_one_warning_names_the_weights():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    veneer.quantize(model, "nf4", double=False)
    with pytest.warns(VeneerWarning, match="^'0', '1', '2' and 2 more: LoftQ: quantising changes nothing") as caught:
        veneer.attach(model, RULE)
    assert [w.filename for w in caught] == [__file__]


def test_statistics_wait_for_weights_that_are_not_there_yet():
    torch.manual_seed(1)
    rules, x = {"0": LoRA(rank=2, init="eva")}, torch.randn(40, 16)
    real = nn.Sequential(nn.Linear(16, 16))
    statistics = veneer.calibrate(real, [(x,)] * 3, rules, progress=False)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16))
    veneer.attach(model, rules, statistics=statistics)
    model.to_empty(device="cpu").load_state_dict(real.state_dict(), strict=False)
    want = real(x)
    assert torch.equal(model(x), want)
    adapter = model[0].adapters["default"]["weight"]
    veneer.attach(real, rules, statistics=statistics)
    assert torch.equal(adapter.A, real[0].adapters["default"]["weight"].A)
    assert adapter.evidence is None
