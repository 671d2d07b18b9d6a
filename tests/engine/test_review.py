"""Cases found in review: unusual layers, routes and wrappers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import veneer
from engine.nets import Net, scatter, tiny_llama
from veneer import DoRA, Full, LoRA, ops
from veneer.attach import attached
from veneer.hosts import Host
from veneer.inspect import explain, update_norms
from veneer.method import VeneerError, VeneerWarning


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class CausalConv1d(nn.Conv1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(nn.functional.pad(x, (2, 0)), self.weight, self.bias)


# -- what is a matrix -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("layer", "wanted"), [(CausalConv1d(4, 6, 3), (2, 12)),
                                               (nn.ConvTranspose1d(4, 6, 3), (2, 18))])
def test_a_convolution_with_its_own_forward_is_one_matrix(layer, wanted):
    x = torch.randn(2, 4, 9)
    veneer.attach(layer, {"weight": LoRA(rank=2)})
    ((_, adapter),) = attached(layer, "default")
    assert tuple(adapter.A.shape) == wanted
    scatter(layer)
    y = layer(x)
    delta = (adapter.B @ adapter.A).reshape(layer.weight.shape)
    with torch.no_grad():
        layer.weight.add_(delta)
    with veneer.disabled(layer):
        torch.testing.assert_close(layer(x), y)


def test_attention_biases_are_no_linear_weights():
    mha = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    names = {entry.name for entry in veneer.plan(nn.Sequential(mha), LoRA(rank=2)).entries}
    assert names == {"0.in_proj_weight", "0.out_proj"}
    x = torch.randn(3, 2, 8)
    veneer.attach(mha, {"bias_k": Full()})
    before = mha(x, x, x)[0]
    scatter(mha, by=1.0)
    assert not torch.allclose(mha(x, x, x)[0], before)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_recomputed_weight_is_refused(wrap):
    with pytest.raises(VeneerError, match="'weight' is computed from 'weight_"):
        veneer.attach(nn.Sequential(wrap(nn.Linear(4, 4))), LoRA(rank=2))


# -- autocast -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Linear(6, 4)])
def test_dora_keeps_autocasts_dtype(layer):
    x = torch.randn(2, 3, 6, 6)
    veneer.attach(layer, {"weight": DoRA(LoRA(rank=2))})
    for mode in ("auto", "reference"):
        with torch.autocast("cpu", torch.bfloat16), ops.use(mode):
            assert layer(x).dtype == torch.bfloat16


def test_autocast_leaves_fp64_alone():
    layer = nn.Linear(4, 4).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    veneer.attach(layer, {"weight": LoRA(rank=2)})
    scatter(layer)
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain)


# -- rows of the batch ----------------------------------------------------------------------------------
def test_unbatched_attention_refuses_several_rows():
    mha = nn.MultiheadAttention(8, 2)
    veneer.attach(mha, {"in_proj_weight": LoRA(rank=2)})
    scatter(mha)
    x = torch.randn(4, 8)
    with veneer.route(mha, ["default", None]), pytest.raises(VeneerError, match="attention query of 2 dimensions"):
        mha(x, x, x)
    plain = mha(x, x, x)[0]
    with veneer.route(mha, ["default"]):
        torch.testing.assert_close(mha(x, x, x)[0], plain)


@pytest.mark.parametrize(("layer", "x"), [(nn.Linear(4, 4), torch.randn(4)),
                                          (nn.Embedding(5, 4), torch.tensor([1, 2])),
                                          (nn.Conv1d(4, 4, 1), torch.randn(4, 6))])
def test_an_input_without_a_batch_refuses_several_rows(layer, x):
    veneer.attach(layer, {"weight": LoRA(rank=2)})
    with veneer.route(layer, ["default", None]), pytest.raises(VeneerError, match="has no batch"):
        layer(x)
    with veneer.route(layer, ["default"]):
        layer(x)


@pytest.mark.parametrize("rule", [{"*linear1": LoRA(rank=2)}, {"*norm1": Full()}, {"norm": Full()}])
def test_a_sequence_first_layer_refuses_several_rows(rule):
    def encoder(batch_first: bool) -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)

    x = torch.randn(2, 4, 8)
    model = veneer.attach(encoder(False), rule)
    with veneer.route(model, ["default", None]), pytest.raises(VeneerError, match="with batch_first=True"):
        model(x)
    model = veneer.attach(encoder(True), rule)
    scatter(model, by=1.0)
    with veneer.route(model, ["default", None]):
        routed = model(x)
    torch.testing.assert_close(routed[:1], model(x[:1]))


def test_attention_in_a_sequence_first_layer_still_routes():
    model = veneer.attach(nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0), {"*attn.*": LoRA(rank=2)})
    scatter(model, by=0.5)
    x = torch.randn(3, 2, 8)
    with veneer.route(model, ["default", None]):
        routed = model(x, x)
    torch.testing.assert_close(routed[:, :1], model(x[:, :1], x[:, :1]))
    with veneer.disabled(model):
        torch.testing.assert_close(routed[:, 1:], model(x[:, 1:], x[:, 1:]))


# -- readers above and beside ---------------------------------------------------------------------------
@pytest.mark.parametrize("root", [lambda la: la.linear1, lambda la: nn.ModuleList([la.linear1])])
def test_a_layer_adapted_by_itself_is_seen_by_the_fused_encoder_layer(root):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = layer(x)
        part = veneer.attach(root(layer), {"*weight": LoRA(rank=2)})
        scatter(part, by=1.0)
        assert not torch.allclose(layer(x), before)
        veneer.detach(part)
        assert not layer.linear1._forward_pre_hooks
        assert torch.equal(layer(x), before)


def test_an_out_proj_without_its_attention_is_refused():
    mha = nn.MultiheadAttention(8, 2)
    for part in (mha.out_proj, nn.ModuleList([mha.out_proj])):
        with pytest.raises(VeneerError, match="is not inside this model"):
            veneer.plan(part, {"*weight": LoRA(rank=2)})
    assert veneer.plan(mha, {"out_proj": LoRA(rank=2)}).entries


def test_two_adapters_give_the_nested_tensor_switch_back():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    assert encoder.use_nested_tensor
    veneer.attach(encoder, {"layers.0.linear1": LoRA(rank=2), "layers.1.linear1": None}, "a")
    veneer.attach(encoder, {"layers.1.linear1": LoRA(rank=2), "layers.0.linear1": None}, "b")
    veneer.detach(encoder, "a")
    assert not encoder.use_nested_tensor
    veneer.detach(encoder)
    assert encoder.use_nested_tensor


# -- reports --------------------------------------------------------------------------------------------
def test_update_norms_of_a_merged_model_are_against_the_base():
    model = veneer.attach(nn.Sequential(nn.Linear(6, 6)), {"0": DoRA(LoRA(rank=2))})
    scatter(model, by=1.0)
    wanted = update_norms(model)
    veneer.merge(model)
    assert update_norms(model) == pytest.approx(wanted)
    veneer.unmerge(model)
    veneer.merge(model, keep=False)
    assert str(update_norms(model)["0"]) == "nan"


def test_explain_knows_of_routed_rows():
    model = veneer.attach(nn.Sequential(nn.Linear(6, 6)), {"0": DoRA(LoRA(rank=2))})
    assert "fused" in explain(model)
    with veneer.route(model, ["default", None]):
        assert "reference" in explain(model)
        assert "for some rows of the batch only" in explain(model)


# -- wrappers and other classes -------------------------------------------------------------------------
def test_conv1d_takes_its_input_by_name():
    from transformers.pytorch_utils import Conv1D

    layer = veneer.attach(Conv1D(6, 4), {"weight": LoRA(rank=2)})
    x = torch.randn(2, 4)
    assert torch.equal(layer(x=x), layer(x))


def test_lazy_modules_are_left_alone_and_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    with pytest.raises(VeneerError, match=r"'1\.weight' of a lazy module, which has no shape yet"):
        veneer.plan(model, {"1": LoRA(rank=2)})
    with pytest.warns(VeneerWarning, match=r"left alone: 1\.weight"):
        made = veneer.plan(model, {"*": LoRA(rank=2)})
    assert [entry.name for entry in made.entries] == ["0"]
    veneer.attach(model, {"0": LoRA(rank=2)})
    assert model(torch.randn(2, 4)).shape == (2, 3)
    assert not model[1].weight.requires_grad
    assert veneer.detach(model)[1].weight.requires_grad


def test_a_resized_embedding_says_so():
    model = veneer.attach(tiny_llama(), {"*embed_tokens": LoRA(rank=2)})
    table = model.get_input_embeddings()
    table.weight.data = torch.cat([table.weight.data, table.weight.data[:3]])
    with pytest.raises(VeneerError, match=r"is now \(32, 16\) and was \(29, 16\) when its adapters were attached"):
        model(torch.tensor([[1, 2]]))


def test_a_compiled_model_is_named_as_the_bare_one():
    bare, inner = Net(), Net()
    compiled = torch.compile(inner, backend="eager")
    veneer.attach(bare, {"layers.*.up": LoRA(rank=2)}, seed=5)
    assert veneer.attach(compiled, {"layers.*.up": LoRA(rank=2)}, seed=5) is compiled
    assert isinstance(inner.layers[0].up, Host)
    assert torch.equal(inner.layers[0].up.adapters.default.weight.A, bare.layers[0].up.adapters.default.weight.A)
    assert list(veneer.adapters(compiled)["default"].weights) == [f"layers.{i}.up" for i in range(3)]


def test_save_pretrained_with_an_adapter_on_a_tied_embedding(tmp_path):
    from safetensors import safe_open

    model = veneer.attach(tiny_llama(tied=True), {"*embed_tokens": DoRA(LoRA(rank=2))})
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        parts = [key.partition(".adapters.")[2] for key in file.keys() if ".adapters." in key]  # noqa: SIM118
    assert sorted(parts) == ["default.weight.inner.A", "default.weight.inner.B", "default.weight.magnitude"]


# -- files ----------------------------------------------------------------------------------------------
def test_a_smaller_base_is_counted_by_the_adapters_own_weights(tmp_path):
    big = veneer.attach(Net(), {"layers.*.up": LoRA(rank=2)})
    veneer.save(big, tmp_path)
    count = len(dict(Net().named_parameters()))
    with pytest.raises(VeneerError, match=rf"another base model: {count} of {count} base weights differ"):
        veneer.load(nn.Sequential(nn.Linear(4, 4)), tmp_path)


def test_loading_into_an_adapter_leaves_it_as_live_and_trainable_as_it_was(tmp_path):
    model = scatter(veneer.attach(Net(), {"layers.*.up": LoRA(rank=2)}))
    veneer.save(model, tmp_path)
    veneer.attach(model, {"layers.*.down": LoRA(rank=2)}, "other")
    for param in model.layers[0].up.adapters.parameters():
        param.requires_grad_(False)
    veneer.load(model, tmp_path)
    assert [name for name, found in veneer.adapters(model).items() if found.live] == ["other"]
    assert not any(p.requires_grad for p in model.layers[0].up.adapters.parameters())


def test_a_convolution_with_its_own_forward_goes_through_a_file(tmp_path):
    torch.manual_seed(1)
    model = scatter(veneer.attach(nn.Sequential(CausalConv1d(4, 6, 3)), {"0": LoRA(rank=2)}))
    x = torch.randn(2, 4, 9)
    assert veneer.save(model, tmp_path).format == "native"
    torch.manual_seed(1)
    other = nn.Sequential(CausalConv1d(4, 6, 3))
    veneer.load(other, tmp_path)
    assert torch.equal(other(x), model(x))
