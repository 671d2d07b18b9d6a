"""Shapes, dtypes, gradient modes, autocast, checkpointing, routes, torch's own fast paths."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import veneer
from veneer import DoRA, Full, LoRA
from veneer.method import VeneerError

from .nets import Net, scatter, tiny_llama

METHODS = [LoRA(rank=3, bias=True), DoRA(LoRA(rank=3)), Full()]
each_method = pytest.mark.parametrize("method", METHODS, ids=str)


def layer(method=None, dtype=torch.float32, in_=6, out=5, name="default"):
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(up=nn.Linear(in_, out).to(dtype)))
    return scatter(veneer.attach(model, {"up": method}, name=name), name)


def merged_weight(model):
    """(W', bias') by merging a copy: what every other path is compared with here."""
    other = veneer.merge(copy.deepcopy(model))
    return other.up._parameters["weight"].detach(), other.up._parameters["bias"].detach()


@each_method
@pytest.mark.parametrize("shape", [(6,), (0, 6), (3, 6), (2, 0, 6), (2, 3, 6), (2, 3, 4, 6)], ids=str)
def test_one_to_four_dimensions_and_empty_batches(method, shape):
    model = layer(method)
    x = torch.randn(shape, requires_grad=True)
    W, b = merged_weight(model)
    y = model(x)
    assert y.shape == (*shape[:-1], 5)
    torch.testing.assert_close(y, F.linear(x, W, b))
    y.sum().backward()
    assert x.grad.shape == x.shape
    torch.testing.assert_close(x.grad, W.sum(0).expand(shape))
    for param in veneer.trainable(model):
        assert param.grad is not None
        assert param.grad.isfinite().all()
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)


@each_method
def test_non_contiguous_inputs_and_gradients(method):
    model = layer(method)
    W, b = merged_weight(model)
    whole = torch.randn(6, 4, 3)
    for x in (whole.permute(1, 2, 0), torch.randn(8, 3, 6)[::2], torch.randn(4, 3, 12)[..., ::2],
              torch.randn(1, 1, 6).expand(4, 3, 6)):
        assert not x.is_contiguous()
        x = x.requires_grad_()
        y = model(x)
        torch.testing.assert_close(y, F.linear(x, W, b))
        upstream = torch.randn(5, 3, 4).permute(2, 1, 0)
        got = torch.autograd.grad(y, [x, *veneer.trainable(model)], upstream)
        same = torch.autograd.grad(model(x.detach().contiguous().requires_grad_()), veneer.trainable(model),
                                   upstream.contiguous())
        torch.testing.assert_close(got[0], upstream @ W)
        for a, c in zip(got[1:], same, strict=True):
            torch.testing.assert_close(a, c)


@each_method
def test_the_input_and_the_base_are_never_written(method):
    model = layer(method)
    x = torch.randn(4, 6, requires_grad=True)
    before = (x.detach().clone(), model.up.weight.detach().clone(), model.up.bias.detach().clone())
    upstream = torch.randn(4, 5)
    kept = upstream.clone()
    model(x).backward(upstream)
    assert torch.equal(upstream, kept)
    for now, then in zip((x, model.up.weight, model.up.bias), before, strict=True):
        assert torch.equal(now, then)


@each_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(method, dtype):
    model = layer(method, dtype)
    x = torch.randn(64, 6, dtype=dtype, requires_grad=True)
    W, b = (t.double() for t in merged_weight(model))
    y = model(x)
    assert y.dtype == dtype
    own = F.linear(x, W.to(dtype), b.to(dtype))
    true = F.linear(x.double(), W, b)
    error, bar = ((t.double() - true).norm() / true.norm() for t in (y, own))
    assert error <= 2 * bar + torch.finfo(dtype).eps
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert {p.grad.dtype for p in veneer.trainable(model)} == {torch.promote_types(dtype, torch.float32)}


@each_method
@pytest.mark.parametrize("inside", [torch.bfloat16, torch.float16])
def test_autocast_over_an_fp32_base(method, inside):
    model = layer(method, in_=32, out=24)
    x = torch.randn(40, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=inside):
        y = model(x)
        with veneer.ops.use("reference"):
            reference = model(x)
    assert y.dtype == reference.dtype == inside
    W, b = merged_weight(model)
    true = F.linear(x, W, b).detach().double()
    errors = [float((t.detach().double() - true).norm() / true.norm()) for t in (y, reference)]
    assert errors[0] <= 2 * errors[1]
    assert errors[1] < 0.02
    upstream = torch.randn(40, 24)
    inputs = [x, *veneer.trainable(model)]
    got = torch.autograd.grad(y, inputs, upstream.to(inside))
    same = torch.autograd.grad(reference, inputs, upstream.to(inside))
    exact = torch.autograd.grad(model(x), inputs, upstream)
    for a, c, e, p in zip(got, same, exact, inputs, strict=True):
        assert a.dtype == p.dtype
        assert float((a - e).norm()) <= 2 * float((c - e).norm()) + torch.finfo(inside).eps * float(e.norm())


def test_autocast_leaves_no_cast_copy_of_the_weight_behind():
    model = layer(LoRA(rank=2), in_=64, out=48)
    saved = []
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False), torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(3, 64, requires_grad=True))
    copies = [t for t in saved if t.shape in ((48, 64), (64, 48)) and t.data_ptr() != model.up.weight.data_ptr()]
    assert not copies


@each_method
def test_no_grad_and_inference_mode(method):
    model = layer(method)
    x = torch.randn(4, 6)
    y = model(x)
    with torch.no_grad():
        quiet = model(x)
        assert not quiet.requires_grad
        torch.testing.assert_close(quiet, y)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), y)
        torch.testing.assert_close(model(x.clone()), y)
    scatter(model)
    with torch.inference_mode():
        moved = model(x)
    assert not torch.allclose(moved, y)
    torch.testing.assert_close(model(x), moved.clone())
    model(x).sum().backward()  # nothing made in inference mode got into the graph
    assert all(p.grad is not None for p in veneer.trainable(model))


@each_method
def test_a_model_made_in_inference_mode(method):
    with torch.inference_mode():
        model = layer(method)
        x = torch.randn(4, 6)
        y = model(x)
        scatter(model)
        assert not torch.equal(model(x), y), "a norm or product was kept beyond the change of what it was made from"


@pytest.mark.parametrize("method", [LoRA(rank=3, bias=True), DoRA(LoRA(rank=3))], ids=str)
def test_double_backward_says_what_to_do_and_the_reference_can(method):
    model = layer(method, torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    y = model(x).pow(2).sum()
    with pytest.raises(VeneerError, match=r"first derivatives only.*veneer\.ops\.use\('reference'\)"):
        torch.autograd.grad(y, x, create_graph=True)
    with veneer.ops.use("reference"):
        y = model(x).pow(2).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        first.pow(2).sum().backward()
    W, b = merged_weight(model)
    z = x.detach().clone().requires_grad_()
    (want,) = torch.autograd.grad(F.linear(z, W, b).pow(2).sum(), z, create_graph=True)
    torch.testing.assert_close(first, want)
    (second,) = torch.autograd.grad(want.pow(2).sum(), z)
    torch.testing.assert_close(x.grad, second)


def test_ops_modes():
    with pytest.raises(VeneerError, match="unknown op mode 'refrence'; did you mean 'reference'"), \
            veneer.ops.use("refrence"):
        pass
    with pytest.raises(RuntimeError, match="stop"), veneer.ops.use("reference"):
        raise RuntimeError("stop")
    model = layer(LoRA(rank=2))
    x = torch.randn(2, 6, requires_grad=True)
    with pytest.raises(VeneerError, match="first derivatives"):  # back to the default after an exception
        torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)


class Checkpointed(nn.Module):
    def __init__(self, method, reentrant):
        super().__init__()
        self.net = Net(blocks=2)
        self.reentrant = reentrant
        veneer.attach(self, {"*.q_proj": method, "*.down": method}, name="b")
        veneer.attach(self, {"*.q_proj": method, "*.down": method}, name="a")
        scatter(self, "a")
        scatter(self, "b")

    def forward(self, ids, keep=False):
        x = self.net.embed(ids).detach().requires_grad_()
        for block in self.net.layers:
            x = block(x) if keep else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.net.lm_head(x)


def grads(model, y, seed=5):
    torch.manual_seed(seed)
    model.zero_grad()
    y.backward(torch.randn(y.shape))
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


reentrant = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])


@each_method
@reentrant
def test_checkpointing_changes_nothing(method, reentrant):
    model = Checkpointed(method if method != METHODS[0] else LoRA(rank=3), reentrant)
    ids = torch.randint(0, 13, (4, 5))
    want = grads(model, model(ids, keep=True))
    got = grads(model, model(ids))
    assert got.keys() == want.keys()
    assert got
    for key in want:
        torch.testing.assert_close(got[key], want[key])


@reentrant
def test_checkpointing_redraws_the_same_dropout(reentrant):
    model = Checkpointed(LoRA(rank=3, dropout=0.5), reentrant)
    ids = torch.randint(0, 13, (4, 5))
    torch.manual_seed(11)
    want = grads(model, model(ids, keep=True))
    torch.manual_seed(11)
    got = grads(model, model(ids))
    for key in want:
        torch.testing.assert_close(got[key], want[key])


@reentrant
def test_checkpointing_under_a_route(reentrant):
    model = Checkpointed(LoRA(rank=3), reentrant)
    ids = torch.randint(0, 13, (4, 5))
    with veneer.route(model, ["a", None, "b", "a"]):
        want = grads(model, model(ids, keep=True))
        got = grads(model, model(ids))
    for key in want:
        torch.testing.assert_close(got[key], want[key])


@reentrant
@pytest.mark.parametrize("leave", ["route", "disabled", "activate"])
def test_backward_outside_the_context_of_a_checkpointed_forward_is_refused(reentrant, leave):
    model = Checkpointed(LoRA(rank=3), reentrant)
    ids = torch.randint(0, 13, (4, 5))
    if leave == "route":
        with veneer.route(model, ["a", None, "b", "a"]):
            y = model(ids)
    elif leave == "disabled":
        with veneer.disabled(model):
            y = model(ids)
    else:
        y = model(ids)
        veneer.activate(model, ["b"])
    with pytest.raises(VeneerError, match=r"gradient checkpointing recomputes .*call backward\(\) inside the same"):
        y.sum().backward()


def test_a_route_without_checkpointing_needs_no_backward_inside():
    model = Checkpointed(LoRA(rank=3), False)
    ids = torch.randint(0, 13, (4, 5))
    with veneer.route(model, ["a", None, "b", "a"]):
        want = grads(model, model(ids, keep=True))
        y = model(ids, keep=True)
    got = grads(model, y)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_routes_nest_and_give_back():
    model = Checkpointed(LoRA(rank=3), False)
    ids = torch.randint(0, 13, (4, 5))
    veneer.activate(model, ["a"])
    live = model(ids, keep=True)
    with veneer.disabled(model):
        bare = model(ids, keep=True)
    with veneer.route(model, ["a"] * 4):
        torch.testing.assert_close(model(ids, keep=True), live)
        with veneer.route(model, [None] * 4):
            assert torch.equal(model(ids, keep=True), bare)
        with veneer.disabled(model):
            with veneer.disabled(model):
                pass
            assert torch.equal(model(ids, keep=True), bare)
        torch.testing.assert_close(model(ids, keep=True), live)
        with pytest.raises(RuntimeError, match="stop"), veneer.route(model, [None] * 4):
            raise RuntimeError("stop")
        torch.testing.assert_close(model(ids, keep=True), live)
    assert torch.equal(model(ids, keep=True), live)


@pytest.mark.parametrize("size", [3, 5, 7])
def test_a_route_that_does_not_fit_the_batch(size):
    model = Checkpointed(LoRA(rank=3), False)
    with veneer.route(model, ["a", None, "b", "a"]), pytest.raises(VeneerError) as caught:
        model(torch.randint(0, 13, (size, 5)))
    assert f"route() was given 4 names, but a layer sees a batch of {size}" in str(caught.value)
    assert "one name (or None) per row of the batch" in str(caught.value)


@pytest.mark.parametrize("bad", ["ab", [], ()])
def test_a_route_needs_names(bad):
    model = Checkpointed(LoRA(rank=3), False)
    with pytest.raises(VeneerError, match="one adapter name or None per row of the batch"), veneer.route(model, bad):
        pass


def test_a_route_over_a_batch_expanded_inside():
    """Two copies of each row side by side, as beams are laid out."""
    model = Checkpointed(LoRA(rank=3), False)
    ids = torch.randint(0, 13, (3, 5))
    with veneer.route(model, ["a", None, "b"]):
        once = model(ids, keep=True)
        twice = model(ids.repeat_interleave(2, 0), keep=True)
    torch.testing.assert_close(twice, once.repeat_interleave(2, 0))


def test_llama_rows_equal_separate_runs():
    model = tiny_llama()
    for name in ("a", "b"):
        scatter(veneer.attach(model, {"*_proj": LoRA(rank=2), "*.embed_tokens": LoRA(rank=2)}, name=name), name)
    tokens = torch.randint(0, 29, (3, 6))
    with veneer.route(model, ["b", None, "a"]):
        mixed = model(tokens).logits
    for row, names in enumerate((["b"], [], ["a"])):
        veneer.activate(model, names)
        torch.testing.assert_close(mixed[row], model(tokens).logits[row])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_transformers_gradient_checkpointing(reentrant):
    model = scatter(veneer.attach(tiny_llama(), {"*_proj": DoRA(LoRA(rank=2))}))
    tokens = torch.randint(0, 29, (2, 6))
    want = grads(model, model(tokens, labels=tokens).loss.reshape(1))
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name that older versions have too
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = grads(model, model(tokens, labels=tokens).loss.reshape(1))
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key])


@pytest.mark.parametrize("what", ["linear1", "linear2", "self_attn.in_proj_weight", "self_attn.out_proj", "norm1"])
@pytest.mark.parametrize("stack", [False, True], ids=["layer", "encoder"])
def test_torch_fast_paths_do_not_pass_the_adapters_by(what, stack):
    torch.manual_seed(0)
    one = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(one, 2, enable_nested_tensor=True) if stack else one
    model.eval()
    method = Full() if what == "norm1" else LoRA(rank=2)
    x = torch.randn(3, 4, 8)
    with torch.no_grad():
        bare = model(x)
        veneer.attach(model, {f"*{what}": method})
        torch.testing.assert_close(model(x), bare)
        scatter(model, by=0.5)
        quick = model(x)
    slow = model.train()(x)
    torch.testing.assert_close(quick, slow)
    assert not torch.allclose(quick, bare, atol=1e-3)
    veneer.detach(model.eval())
    with torch.no_grad():
        assert torch.equal(model(x), bare)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("grad", [True, False])
def test_torch_attention_fast_path(grad):
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)}).eval()
    x = torch.randn(3, 4, 8)
    scatter(veneer.attach(model, {"attn.in_proj_weight": LoRA(rank=2), "attn.out_proj": DoRA(LoRA(rank=2))}), by=0.5)
    slow = model.train()["attn"](x, x, x)[0].detach()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model.eval()["attn"](x, x, x)[0], slow)
        torch.testing.assert_close(model["attn"](x, x, x, need_weights=False)[0], slow)


def test_state_dict_round_trip_with_adapters():
    model = scatter(veneer.attach(Net(), METHODS[0]))
    other = veneer.attach(Net(), METHODS[0])
    other.load_state_dict(model.state_dict())
    ids = torch.randint(0, 13, (2, 5))
    assert torch.equal(model(ids), other(ids))


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 5, 6))
        self.fail = False

    def forward(self, x):
        if self.fail:
            raise RuntimeError("stop")
        return torch.einsum("ti,eoi->teo", x, self.w)


def test_a_parameter_is_shown_only_while_the_forward_runs():
    model = Fused()
    stored = model.w
    scatter(veneer.attach(model, {"w": LoRA(rank=2)}))
    x = torch.randn(2, 6)
    changed = model(x)
    assert model.w is stored
    assert dict(model.named_parameters())["w"] is stored
    assert model.state_dict()["w"].data_ptr() == stored.data_ptr()
    assert not torch.equal(changed, torch.einsum("ti,eoi->teo", x, stored))
    model.fail = True
    with pytest.raises(RuntimeError, match="stop"):
        model(x)
    assert model.w is stored, "still shown after an exception"
    model.w = nn.Parameter(torch.zeros(3, 5, 6))
    assert not model.w.any()
    assert not dict(model.named_parameters())["w"].any()


def test_what_adapting_by_parameter_cannot_know_is_refused_for_rows():
    class Odd(Fused):
        def forward(self, x):
            return {"y": super().forward(x)}

    model = veneer.attach(Odd(), {"w": LoRA(rank=2)}, name="a")
    with veneer.route(model, ["a", None]), pytest.raises(VeneerError, match=r"cannot tell the rows apart .*type dict"):
        model(torch.randn(2, 6))
