"""One pass over data: what is collected, of what, how often, and what is said when that cannot be."""

from __future__ import annotations

import io
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import veneer
from veneer import LoRA
from veneer.calibrate import calibrate
from veneer.calibration.inputs import Inputs
from veneer.calibration.progress import Progress
from veneer.calibration.rows import attention_mask
from veneer.inits import EVA
from veneer.method import VeneerError, VeneerWarning

from .calibrating import Attention, cut, found, seen_by, tokens
from .nets import tiny_llama

QKV = ("q", "k", "v")


def rules(init="eva", rank=2, names=(*QKV, "o")):
    return dict.fromkeys(names, LoRA(rank=rank, init=init))


def same_subspace(a, b, atol=1e-4):
    assert torch.allclose(a.T @ a, b.T @ b, atol=atol)


# -- the statistics themselves ------------------------------------------------------------------------------
@pytest.mark.parametrize("pieces", [1, 3, 40])
def test_incremental_svd_of_few_directions_is_the_svd_of_all(pieces):
    rows = torch.randn(200, 5) @ torch.randn(5, 20) + torch.randn(20)  # a mean that is no direction of variance
    state = Inputs.empty(20, 5)
    for piece in rows.tensor_split(pieces):
        state = state.add(piece)
    evidence = state.evidence()
    _, S, V = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert torch.allclose(evidence["singular"], S[:5], rtol=1e-4)
    same_subspace(evidence["components"], V[:5])
    assert torch.allclose((evidence["components"] * V[:5]).sum(1).abs(), torch.ones(5), atol=1e-4)
    assert torch.allclose(evidence["mean"], rows.mean(0), atol=1e-5)
    assert float(evidence["total"]) == pytest.approx(float((rows - rows.mean(0)).square().sum()), rel=1e-5)
    assert int(evidence["count"]) == 200


def test_incremental_svd_of_many_directions_is_near_the_svd_of_all():
    rows = torch.randn(2000, 60) * torch.logspace(0, -1.5, 60)
    state = Inputs.empty(60, 8)
    for piece in rows.split(100):
        state = state.add(piece)
    components = state.evidence()["components"]
    best = torch.linalg.svdvals(rows - rows.mean(0))[:8].square().sum()
    assert float(((rows - rows.mean(0)) @ components.T).square().sum() / best) > 0.999
    assert torch.allclose(components @ components.T, torch.eye(8), atol=1e-6)


def test_few_rows_wait_until_they_say_something():
    state = Inputs.empty(6, 4).add(torch.randn(40, 6))
    more = state.add(torch.randn(3, 6))
    assert more.count == 40, "3 rows cannot tell 4 components"
    assert more.seen == 43
    assert more.add(torch.randn(1, 6)).count == 44
    assert int(more.evidence()["count"]) == 43, "but none is lost in the end"


def test_fewer_directions_than_components_are_fewer_components():
    evidence = Inputs.empty(9, 6).add(torch.randn(50, 2) @ torch.randn(2, 9)).evidence()
    assert evidence["components"].shape == (2, 9)
    assert int(evidence["sought"]) == 6


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_the_covariance_is_the_same_for_every_batch_size(size):
    model, batch = Attention(), tokens()
    X = seen_by(model, "o", [batch])
    statistics = found(model, cut(batch, size), rules("corda"))
    assert torch.allclose(statistics["o"]["covariance"], X.T @ X, rtol=1e-5, atol=1e-5)
    assert int(statistics["o"]["count"]) == 60
    assert statistics.tokens == 60


@pytest.mark.parametrize("size", [1, 4, 6])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_the_gradient_is_autograds_for_every_batch_size(size, layout):
    model, batch = Attention(), tokens()
    if layout == "conv1d":  # stored as (in, out)
        from transformers.pytorch_utils import Conv1D
        model.o = Conv1D(12, 12)
    model(**batch)["loss"].backward()
    expected = {name: model.get_submodule(name).weight.grad.clone() for name in (*QKV, "o")}
    if layout == "conv1d":
        expected["o"] = expected["o"].T
    model.zero_grad()
    statistics = found(model, cut(batch, size), rules("lora_ga"), compress=False)
    for name, gradient in expected.items():
        assert torch.allclose(statistics[name]["gradient"], gradient, rtol=1e-4, atol=1e-6), name
        assert model.get_submodule(name).weight.grad is None


def test_a_compressed_gradient_is_its_leading_triplets():
    model, batch = Attention(), tokens()
    whole = found(model, [batch], rules("lora_ga"), compress=False)["o"]["gradient"]
    triplets = found(model, [batch], rules("lora_ga"))["o"]
    U, S, V = torch.linalg.svd(whole)
    assert torch.allclose(triplets["singular"], S[:4], rtol=1e-3)
    best = U[:, :4] * S[:4] @ V[:4]
    assert torch.allclose(triplets["left"] * triplets["singular"] @ triplets["right"], best, atol=1e-4 * float(S[0]))


# -- which layers, which inputs -----------------------------------------------------------------------------
def test_shared_inputs_are_computed_once(monkeypatch):
    added = []
    original = Inputs.add
    monkeypatch.setattr(Inputs, "add", lambda self, rows: added.append(len(rows)) or original(self, rows))
    statistics = found(Attention(), cut(tokens(), 3), rules())
    assert added == [30, 30, 30, 30], "one for q, k and v, one for o, in each of two batches"
    assert statistics["q"]["components"] is statistics["v"]["components"]
    assert statistics["o"]["components"] is not statistics["q"]["components"]


class Changing(nn.Module):
    """Two layers that share their input in some forwards and not in others; the second may be left out, or called
    twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, y=None, twice=False, only=False):
        out = self.a(x)
        if only:
            return out
        out = out + self.b(x if y is None else y)
        return out + self.b(x) if twice else out


@pytest.mark.parametrize("kwargs", [dict(y=torch.randn(5, 4)), dict(twice=True), dict(only=True)])
def test_inputs_that_are_shared_only_sometimes(kwargs):
    model, shared, other = Changing(), torch.randn(9, 4), torch.randn(5, 4)
    batches = [{"x": shared}, {"x": other, **kwargs}, {"x": shared}]
    expected = {name: seen_by(model, name, batches) for name in ("a", "b")}
    statistics = found(model, batches, rules("corda", names=("a", "b")))
    for name, X in expected.items():
        assert torch.allclose(statistics[name]["covariance"], X.T @ X, rtol=1e-5, atol=1e-5), name
        assert int(statistics[name]["count"]) == len(X)


def test_a_tensor_changed_in_place_is_another_input():
    class InPlace(Changing):
        def forward(self, x):
            y = x.clone()
            out = self.a(y)
            y.mul_(2)
            return out + self.b(y)

    X = torch.randn(9, 4)
    statistics = found(InPlace(), [X], rules("corda", names=("a", "b")))
    assert torch.allclose(statistics["b"]["covariance"], 4 * X.T @ X, rtol=1e-5)
    assert torch.allclose(statistics["a"]["covariance"], X.T @ X, rtol=1e-5)


@pytest.mark.parametrize("options", [dict(padding=1, stride=2), dict(padding="same", dilation=2),
                                     dict(groups=2, padding_mode="circular", padding=1)])
@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_convolutions(options, init):
    conv = nn.Conv2d(4, 6, 3, **options)
    model = nn.Sequential(conv, nn.ReLU(inplace=True))
    x = torch.randn(3, 4, 8, 8)
    statistics = found(model, [x], {"0": LoRA(rank=2, init=init)}, compress=False,
                       forward=lambda m, b: m(b).square().mean())["0"]
    if init == "lora_ga":
        model(x).square().mean().backward()
        assert torch.allclose(statistics["gradient"], conv.weight.grad.flatten(1), rtol=1e-4, atol=1e-6)
        return
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=options.get("padding_mode", "constant"))
    columns = F.unfold(padded, 3, stride=conv.stride, dilation=conv.dilation)  # (B, groups · in, places)
    rows = columns.unflatten(1, (conv.groups, -1)).permute(0, 3, 1, 2).flatten(0, 2)
    assert torch.allclose(statistics["covariance"], rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_one_and_three_dimensional_convolutions():
    for conv, x in ((nn.Conv1d(3, 5, 3, padding=1), torch.randn(2, 3, 9)),
                    (nn.Conv3d(2, 4, 2, stride=2), torch.randn(2, 2, 4, 6, 4)),
                    (nn.Conv1d(3, 5, 3), torch.randn(3, 9))):  # no batch
        conv(x).square().sum().backward()
        statistics = found(nn.Sequential(conv), [(x,)], {"0": LoRA(rank=1, init="lora_ga")}, compress=False,
                           forward=lambda m, b: m(*b).square().sum())
        assert torch.allclose(statistics["0"]["gradient"], conv.weight.grad.flatten(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inside", [False, True], ids=["in the forward", "around all"])
@pytest.mark.parametrize("init", ["corda", "lora_ga", "eva"])
def test_under_autocast_the_sums_are_in_fp32(init, inside):
    def forward(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(batch)
            assert output.dtype == torch.bfloat16
            return output.float().sum()

    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(40, 6) + 1
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
        statistics = found(model, [x], LoRA(rank=2, init=init), compress=False, forward=forward)["0"]
    if init == "eva":
        assert torch.allclose(statistics["singular"][:2], torch.linalg.svdvals(x - x.mean(0))[:2], rtol=1e-5)
        return
    made = statistics["covariance" if init == "corda" else "gradient"]
    assert made.dtype == torch.float32
    assert torch.allclose(made, x.T @ x if init == "corda" else x.sum(0).expand(5, 6), rtol=1e-5, atol=1e-4)


def test_a_weight_in_two_places_sees_both():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
    model[2].weight = model[0].weight
    x = torch.randn(20, 6)
    X = torch.cat([seen_by(model, name, [{"input": x}]) for name in ("0", "2")])
    assert torch.allclose(found(model, [x], LoRA(rank=2, init="corda"))["0"]["covariance"], X.T @ X, rtol=1e-4)
    model(x).square().mean().backward()
    statistics = found(model, [x], LoRA(rank=2, init="lora_ga"), compress=False,
                       forward=lambda m, b: m(b).square().mean())
    assert torch.allclose(statistics["0"]["gradient"], model[0].weight.grad, rtol=1e-4, atol=1e-6)


def test_a_packed_base():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 64))
    veneer.quantize(model, "nf4")
    dense = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 64))
    with torch.no_grad():
        for mine, theirs in ((dense[0], model[0]), (dense[2], model[2])):
            mine.weight.copy_(theirs.read())
            mine.bias.copy_(theirs.bias)
    x, options = torch.randn(40, 64), dict(compress=False, forward=lambda m, b: m(b).square().mean())
    for init, key in (("lora_ga", "gradient"), ("corda", "covariance")):
        ours, theirs = (found(m, [x], LoRA(rank=2, init=init), **options) for m in (model, dense))
        for name in ("0", "2"):
            assert torch.allclose(ours[name][key], theirs[name][key], rtol=1e-4, atol=1e-6)


def test_adapters_take_no_part():
    model, batch = Attention(), tokens()
    bare = found(model, [batch], rules("corda"))
    veneer.attach(model, {"*": LoRA(rank=2, init="orthogonal")}, name="other")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if ".adapters." in name:
                param.fill_(1.0)
    again = found(model, [batch], rules("corda"))
    for name in bare:
        assert torch.equal(bare[name]["covariance"], again[name]["covariance"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_gives_32_bit_statistics(dtype):
    model, batch = Attention().to(dtype), tokens()
    for init, key in (("eva", "components"), ("corda", "covariance"), ("lora_ga", "left")):
        statistics = found(model, [batch], rules(init))
        assert statistics["o"][key].dtype == torch.float32
        assert torch.isfinite(statistics["o"][key]).all()


def test_one_pass_collects_several_kinds():
    model, batch = Attention(), tokens()
    mixed = {"q": LoRA(rank=2, init="eva"), "k": LoRA(rank=2, init="corda"), "v": LoRA(rank=2, init="lora_ga"),
             "o": LoRA(rank=2)}
    statistics = found(model, [batch], mixed)
    assert statistics.kinds == {"q": "inputs", "k": "covariance", "v": "gradient"}
    assert list(statistics) == ["q", "k", "v"]
    assert torch.equal(statistics["k"]["covariance"], found(model, [batch], rules("corda"))["k"]["covariance"])


# -- which positions ----------------------------------------------------------------------------------------
def padded(batch, by=4):
    """The same with padding on the right, which the masks say is none of it."""
    ids = F.pad(batch["input_ids"], (0, by), value=3)
    return {"input_ids": ids, "attention_mask": F.pad(torch.ones_like(batch["input_ids"]), (0, by))}


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_padding_does_not_count(init):
    model, batch = Attention(), tokens()
    key = {"eva": "components", "corda": "covariance"}[init]
    plain = found(model, [{"input_ids": batch["input_ids"]}], rules(init))
    with_padding = found(model, [padded(batch)], rules(init))
    assert with_padding.tokens == 60
    for name in plain:
        assert torch.allclose(plain[name][key], with_padding[name][key], rtol=1e-4, atol=1e-4), name
    unmasked = found(model, [padded(batch)], rules(init), mask=lambda batch: None)
    assert int(unmasked["o"]["count"]) == 84


def test_only_positions_with_a_label_count():
    model, batch = Attention(), tokens()
    labels = batch["labels"].clone()
    labels[:, :7] = -100
    X = seen_by(model, "o", [{"input_ids": batch["input_ids"]}]).unflatten(0, (6, 10))
    kept = X[:, 7:].flatten(0, 1)
    statistics = found(model, [{**batch, "labels": labels}], rules("corda"))
    assert torch.allclose(statistics["o"]["covariance"], kept.T @ kept, rtol=1e-5, atol=1e-5)
    assert statistics.tokens == 18
    mask = torch.ones_like(labels)
    mask[0] = 0  # labels there, but padding
    statistics = found(model, [{**batch, "labels": labels, "attention_mask": mask}], rules("corda"))
    assert torch.allclose(statistics["o"]["covariance"], X[1:, 7:].flatten(0, 1).T @ X[1:, 7:].flatten(0, 1),
                          rtol=1e-5, atol=1e-5)
    every = found(model, [{**batch, "labels": labels}], rules("corda"), mask=attention_mask)
    assert int(every["o"]["count"]) == 60


def test_a_batch_without_a_usable_position_is_passed_over():
    model, batch = Attention(), tokens()
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    for init in ("corda", "lora_ga"):
        with_it, without = (found(model, b, rules(init)) for b in ([empty, batch], [batch]))
        key = "covariance" if init == "corda" else "singular"
        assert torch.equal(with_it["o"][key], without["o"][key])


def test_labels_of_whole_examples_are_no_mask():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mid, self.score = nn.Embedding(17, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, input_ids, attention_mask, labels):
            return F.cross_entropy(self.score(self.mid(self.embed(input_ids)).mean(1)), labels)

    batch = {**padded(tokens()), "labels": torch.tensor([0, 1, 1, -100, 0, 1])}
    statistics = found(Classifier(), [batch], {"mid": LoRA(rank=2, init="corda"), "score": LoRA(rank=1, init="corda")})
    assert int(statistics["mid"]["count"]) == 60
    assert int(statistics["score"]["count"]) == 6, "one pooled row for each example, without a warning"


def test_inputs_flattened_before_the_layer_are_masked_too():
    class Flat(Attention):
        def forward(self, input_ids, attention_mask=None):
            return self.o(self.embed(input_ids).flatten(0, 1))

    batch = padded(tokens())
    assert int(found(Flat(), [batch], rules("corda", names=("o",)))["o"]["count"]) == 60


def test_a_mask_that_fits_no_input_is_said():
    class Routed(Attention):
        def forward(self, input_ids, attention_mask=None):
            return self.o(self.embed(input_ids).flatten(0, 1)[::3])

    message = "no mask has the shape of the input of 'o', so all of its positions counted, padding too"
    with pytest.warns(VeneerWarning, match=message):
        statistics = found(Routed(), [padded(tokens())], rules("corda", names=("o",)))
    assert int(statistics["o"]["count"]) == 28


def test_two_masks_for_an_encoder_and_a_decoder():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.enc, self.dec = nn.Embedding(17, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, input_ids, labels, attention_mask):
            memory = self.enc(self.embed(input_ids)).mean(1, keepdim=True)
            return self.dec(self.embed(labels.clamp_min(0)) + memory)

    labels = torch.randint(0, 17, (6, 5))
    labels[:, 3:] = -100
    statistics = found(Pair(), [{**padded(tokens()), "labels": labels}],
                       {"enc": LoRA(rank=1, init="corda"), "dec": LoRA(rank=1, init="corda")})
    assert int(statistics["enc"]["count"]) == 60
    assert int(statistics["dec"]["count"]) == 18


# -- when it ends -------------------------------------------------------------------------------------------
class Counting(Attention):
    calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return super().forward(*args, **kwargs)


def test_the_pass_ends_when_all_components_have_settled():
    model, batch = Counting(), tokens(20)
    calibrate(model, [batch] * 50, rules("eva", rank=3))
    assert model.calls == 2, "what is seen again changes nothing"
    model.calls = 0
    found(model, [batch] * 5, rules("corda"))
    assert model.calls == 5, "every batch counts for a covariance"


def test_a_layer_that_has_settled_is_left_alone_while_others_go_on(monkeypatch):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.steady, self.noisy = nn.Linear(5, 5), nn.Linear(7, 7)

        def forward(self, x):
            self.steady(x)
            return self.noisy(torch.randn(20, 7))

    added = []
    original = Inputs.add
    monkeypatch.setattr(Inputs, "add", lambda self, rows: added.append(rows.shape[1]) or original(self, rows))
    x = torch.randn(20, 5) * torch.tensor([5.0, 4, 3, 2, 1])
    statistics = found(Two(), [x] * 6, {"*": LoRA(rank=2, init=EVA(rho=1.0))})
    assert added.count(5) == 2
    assert added.count(7) == 6
    assert int(statistics["steady"]["count"]) == 40
    assert int(statistics["noisy"]["count"]) == 120


def test_components_that_never_settle_are_said_unless_the_number_of_batches_was():
    model = Attention()
    batches = [tokens() for _ in range(2)]
    with pytest.warns(VeneerWarning, match="the components of 4 of 4 weights .* had not settled after all 2 batches; "
                                           "give more of them, or a smaller tau"):
        calibrate(model, batches, rules(EVA(tau=1.0)))
    calibrate(model, batches, rules(EVA(tau=1.0)), max_batches=2)


def test_max_batches_takes_no_more():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield tokens()

    statistics = found(Attention(), endless(), rules("corda"), max_batches=3)
    assert statistics.tokens == 180
    assert len(taken) == 3


def test_some_weights_only():
    statistics = found(Attention(), [tokens()], rules("corda"), weights=["k", "o"])
    assert list(statistics) == ["k", "o"]
    with pytest.raises(VeneerError, match="no weight 'kk' with such a start; did you mean 'k'"):
        found(Attention(), [tokens()], rules("corda"), weights=["kk"])


def test_the_order_of_weights_changes_no_bit():
    batch = tokens(16)
    first, second = (found(Attention(), [batch], rules(names=names)) if torch.manual_seed(1) else None
                     for names in ((*QKV, "o"), ("o", "v", "k", "q")))
    for name in first:
        assert torch.equal(first[name]["components"], second[name]["components"])


# -- the model is what it was -------------------------------------------------------------------------------
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_the_model_is_left_as_it_was(init, fails):
    model = Attention()
    model.o.eval()
    model.k.weight.requires_grad_(False)
    before = ({name: module.training for name, module in model.named_modules()},
              {name: param.requires_grad for name, param in model.named_parameters()})
    batch = tokens()
    batches = [batch, {**batch, "input_ids": batch["input_ids"] + 99}] if fails else [batch]
    with pytest.raises(IndexError) if fails else torch.no_grad():
        found(model, batches, rules(init))
    assert before == ({name: module.training for name, module in model.named_modules()},
                      {name: param.requires_grad for name, param in model.named_parameters()})
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._backward_hooks for m in model.modules())
    assert all(param.grad is None for param in model.parameters())


def test_it_runs_in_evaluation_mode_and_takes_batches_of_any_form():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
    x = torch.randn(10, 4)
    for batch in (x, (x,), {"input": x}):
        statistics = found(model, [batch], {"1": LoRA(rank=1, init="corda")})
        assert torch.allclose(statistics["1"]["covariance"], x.T @ x, rtol=1e-5)


def test_a_loss_of_any_form():
    model, batch = Attention(), tokens()
    expected = found(model, [batch], rules("lora_ga"), compress=False)["o"]["gradient"]

    class Output:
        loss = None

    def as_object(model, batch):
        out = Output()
        out.loss = model(**batch)["loss"]
        return out

    for forward in (as_object, lambda m, b: m(**b)["loss"], lambda m, b: m(**b)["loss"].reshape(1)):
        again = found(model, [batch], rules("lora_ga"), compress=False, forward=forward)
        assert torch.equal(again["o"]["gradient"], expected)


def test_a_language_model_of_transformers():
    model = tiny_llama()
    ids = torch.randint(0, 29, (4, 12))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    for init in ("eva", "corda", "lora_ga"):
        statistics = found(model, [batch], LoRA(rank=2, init=init))
        assert len(statistics) == 14
    shared = found(model, [batch], LoRA(rank=2, init="corda"))
    assert len({id(found_["covariance"]) for found_ in shared.values()}) == 8, "q, k, v and gate, up share"


# -- failures -----------------------------------------------------------------------------------------------
def message_of(model, batches, rules_, **options):
    with pytest.raises(VeneerError) as caught:
        found(model, batches, rules_, **options)
    return re.sub(r"\s+", " ", str(caught.value))


def test_no_usable_position():
    batch = tokens()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for init in ("eva", "corda", "lora_ga"):
        text = message_of(Attention(), [batch, batch], rules(init))
        assert "the 2 batches have no usable position: every label is -100, or all is padding" in text
    assert "there are no batches" in message_of(Attention(), [], rules())


def test_no_method_that_starts_from_data():
    text = message_of(Attention(), [tokens()], {"o": LoRA(rank=3)})
    assert text.startswith("calibrate: nothing in LoRA(rank=3) starts from data; a start that does is LoRA(init=")


def test_weights_whose_inputs_nobody_sees():
    text = message_of(Attention(), [tokens()], {"embed": LoRA(rank=2, init="eva")})
    assert "an embedding looks rows up and is given no input; use another start for it" in text
    attention = nn.MultiheadAttention(8, 2)
    for name in ("in_proj_weight", "out_proj"):
        text = message_of(attention, [(torch.randn(3, 2, 8),) * 3], {name: LoRA(rank=2, init="corda")})
        assert "is read by its module as a parameter, so that its inputs are seen nowhere" in text

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.randn(3, 8, 6))

    text = message_of(Experts(), [torch.randn(3)], {"gate_up": LoRA(rank=2, init="corda")})
    assert "the inputs of fused experts pass no layer where they could be seen" in text


def test_a_layer_that_is_never_called():
    class Idle(Attention):
        def __init__(self):
            super().__init__()
            self.idle, self.idler = nn.Linear(3, 3), nn.Linear(3, 3)

    for init, what in (("corda", "was given no input that counts"), ("lora_ga", "got no gradient from the loss")):
        text = message_of(Idle(), [tokens()], rules(init, rank=1, names=("o", "idle", "idler")))
        assert f"'idle' and 1 more {what} in 1 batch" in text
        assert "leave it out with a rule None" in text


def test_a_part_of_the_model_that_the_loss_does_not_reach():
    def detached(model, batch):
        return model.lm_head(model.o(model.embed(batch["input_ids"])).detach() * 1.0).mean()

    text = message_of(Attention(), [tokens()], rules("lora_ga", names=("o",)), forward=detached)
    assert "the loss does not depend on any of the weights whose gradients are wanted" in text


def test_no_loss():
    ids = {"input_ids": tokens()["input_ids"]}
    text = message_of(Attention(), [ids], rules("lora_ga"))
    assert "needs a loss, and the forward gave a tensor (6, 10, 17). Put labels into the batches" in text
    text = message_of(Attention(), [ids], rules("lora_ga"), forward=lambda m, b: {"logits": m(**b)})
    assert "the forward gave dict without one" in text
    text = message_of(Attention(), [tokens()], rules("lora_ga"), forward=lambda m, b: m(**b)["loss"] * float("nan"))
    assert "the loss of batch 1 is nan" in text


def test_not_a_number():
    model = Attention()
    with torch.no_grad():
        model.v.weight[0, 0] = float("inf")
    assert "the input of 'o' holds NaN or infinite values" in message_of(model, [tokens()], rules("corda"))
    model = Attention()

    text = message_of(model, [tokens()], rules("lora_ga", names=("o",)),
                      forward=lambda model, batch: _Exploding.apply(model.o(torch.ones(1, 12))))
    assert "the gradient of 'o' is not finite in this batch" in text


class _Exploding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sum()

    @staticmethod
    def backward(ctx, dy):
        return torch.full_like(ctx.saved_tensors[0], float("inf"))


def test_an_input_changed_in_place_before_the_backward_pass():
    class InPlace(Attention):
        def forward(self, input_ids, labels=None):
            x = self.q(self.embed(input_ids))
            y = self.o(x)
            x.mul_(2)
            return (y.sum() + x.sum()).square()

    text = message_of(InPlace(), [tokens()], rules("lora_ga", names=("q", "o")))
    assert "the input of 'o' is changed in place after its forward" in text


def test_inputs_that_do_not_vary():
    model = nn.Sequential(nn.Linear(4, 4))
    text = message_of(model, [torch.ones(9, 4)], LoRA(rank=2, init="eva"))
    assert "the inputs of '0' do not vary: 9 of them, all equal" in text


def test_a_model_without_values():
    with torch.device("meta"):
        model = Attention()
    assert "'q' is on the meta device; load the model first" in message_of(model, [tokens()], rules("corda"))


def test_a_mask_that_is_none():
    text = message_of(Attention(), [tokens()], rules("corda"), mask=lambda batch: torch.ones(6, 10))
    assert "mask must give a boolean tensor, a list of them or None" in text


def test_a_merged_model():
    model = veneer.attach(Attention(), {"o": LoRA(rank=2)})
    veneer.merge(model)
    assert "is merged into the base weights" in message_of(model, [tokens()], rules("corda", names=("q",)))


# -- progress -----------------------------------------------------------------------------------------------
class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_line():
    stream = Terminal()
    bar = Progress(4, True, stream)
    bar.step(1, "2 of 8 settled, ")
    bar.step(4, "8 of 8 settled, ")
    bar.close()
    first, last = stream.getvalue().strip().split("\r")
    assert first == "calibrate [======                  ] 1/4 batches, 2 of 8 settled, 0 s"
    assert last == "calibrate [========================] 4/4 batches, 8 of 8 settled, 0 s"
    for wanted, stream in ((True, io.StringIO()), (False, Terminal())):
        bar = Progress(None, wanted, stream)
        bar.step(1, "")
        bar.close()
        assert stream.getvalue() == ""
    stream = Terminal()
    Progress(None, True, stream).step(3, "")
    assert stream.getvalue() == "\rcalibrate 3 batches, 0 s"


def test_batches_without_a_mask_weigh_by_their_tokens():
    """The mean gradient over all tokens, however they are cut into batches of several lengths."""
    model, long, short = Attention(), tokens(4, 12), tokens(4, 3)

    def loss(model, batch):
        logits = model(batch["input_ids"])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["target"].flatten())

    batches = [{"input_ids": b["input_ids"], "target": b["labels"]} for b in (long, short)]
    statistics = found(model, batches, rules("lora_ga"), forward=loss, compress=False, mask=lambda batch: None)
    total = sum(loss(model, b) * b["input_ids"].numel() for b in batches) / (48 + 12)
    grad = torch.autograd.grad(total, model.o.weight)[0]
    assert torch.allclose(statistics["o"]["gradient"], grad, atol=1e-6)
