"""prepare_for_kbit_training: frozen, norms in fp32 that nobody around them notices, gradients through checkpoints."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import veneer
from veneer import LoRA
from veneer.kbit import unprepare
from veneer.method import VeneerError


class RMSNorm(nn.Module):
    """One of transformers' kind: computes in fp32, and multiplies in the dtype of its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = RMSNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.second(self.first(hidden=x)))))


class Model(nn.Module):
    """Switches checkpointing on and off as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(2))
        self.lm_head = nn.Linear(16, 11)
        self.options: dict | None = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.options is not None

    def gradient_checkpointing_enable(self, options: dict) -> None:
        self.options = options

    def gradient_checkpointing_disable(self) -> None:
        self.options = None

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x) if self.options is None else checkpoint(block, x, **self.options)
        return self.lm_head(x)


def model(dtype: torch.dtype = torch.bfloat16) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


IDS = torch.arange(10).view(2, 5)


def norms(net: Model) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, (RMSNorm, nn.LayerNorm))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_run_in_fp32_and_give_what_they_are_given(dtype: torch.dtype) -> None:
    net = model(dtype)
    x = torch.randn(7, 16, dtype=dtype)
    exact = [copy.deepcopy(norm).float()(x.float()) for norm in norms(net)]
    rest = {name: p.dtype for name, p in net.named_parameters() if "first" not in name and "second" not in name}
    assert veneer.prepare_for_kbit_training(net, gradient_checkpointing=False) is net
    for norm, want in zip(norms(net), exact, strict=True):
        assert norm.weight.dtype == torch.float32
        assert torch.equal(norm(x), want.to(dtype)), "computed in fp32, rounded once"
        assert norm(x.float()).dtype == torch.float32
    assert all(net.get_parameter(name).dtype == kind for name, kind in rest.items())
    assert net(IDS).dtype == dtype
    assert not any(p.requires_grad for p in net.parameters())


def test_an_fp32_model_has_nothing_to_widen() -> None:
    net = model(torch.float32)
    veneer.prepare_for_kbit_training(net, gradient_checkpointing=False)
    assert not any(norm._forward_hooks or norm._forward_pre_hooks for norm in norms(net))


def test_a_second_call_changes_nothing() -> None:
    net = model()

    def seen() -> list:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
        return [hooks, [(p.dtype, p.requires_grad) for p in net.parameters()], net.options]

    veneer.prepare_for_kbit_training(net)
    first = seen()
    assert first[2] == {"use_reentrant": False}
    veneer.attach(net, LoRA(rank=2))
    trained = [p for p in net.parameters() if p.requires_grad]
    veneer.detach(veneer.prepare_for_kbit_training(net, gradient_checkpointing={"use_reentrant": True}))
    assert seen() == first
    assert trained, "an adapter that is there already stays trainable"
    assert all(p.requires_grad for p in trained)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("quantised", [True, False])
def test_checkpointed_adapters_have_the_gradients_of_ordinary_ones(reentrant: bool, quantised: bool) -> None:
    found = []
    for options in (False, {"use_reentrant": reentrant}):
        net = model()
        if quantised:
            veneer.quantize(net, "nf4")
        veneer.prepare_for_kbit_training(net, gradient_checkpointing=options)
        veneer.attach(net, LoRA(rank=2))
        with torch.no_grad():
            for i, p in enumerate(veneer.trainable(net)):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / 10)
        net(IDS).float().square().sum().backward()
        found.append([p.grad for p in veneer.trainable(net)])
    # A reentrant checkpoint's own forward runs without gradients, where a packed layer goes another way.
    error = 2e-2 if reentrant and quantised else 0.0
    assert all(float((a - b).norm()) <= error * float(b.norm()) for a, b in zip(*found, strict=True))
    assert all(grad.any() for grad in found[0])


def test_without_the_hook_a_reentrant_checkpoint_has_no_gradient() -> None:
    net = model()
    veneer.attach(net, LoRA(rank=2))
    net.options = {"use_reentrant": True}
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        out = net(IDS)
    assert not out.requires_grad


def test_it_is_taken_back_whole() -> None:
    net = model()
    net.embed.weight.requires_grad = False
    before = {k: v.clone() for k, v in net.state_dict().items()}
    veneer.prepare_for_kbit_training(net)
    for each in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert unprepare(each) is each
        after = each.state_dict()
        assert all(after[k].dtype == v.dtype and torch.equal(after[k], v) for k, v in before.items())
        assert [n for n, p in each.named_parameters() if not p.requires_grad] == ["embed.weight"]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in each.modules())
        assert each.options is None
        assert unprepare(each) is each


def test_it_does_not_turn_off_what_was_on() -> None:
    net = model()
    net.options = {"use_reentrant": False}
    unprepare(veneer.prepare_for_kbit_training(net))
    assert net.options == {"use_reentrant": False}


def test_a_later_cast_of_the_model_is_no_harm() -> None:
    net = veneer.prepare_for_kbit_training(model(), gradient_checkpointing=False)
    net.to(torch.float16)
    assert net(IDS).dtype == torch.float16


def test_no_gradients_are_asked_for_where_there_are_none() -> None:
    net = veneer.prepare_for_kbit_training(model())
    with torch.no_grad():
        assert not net.embed(IDS).requires_grad
    with torch.inference_mode():
        net(IDS)


class NoEmbeddings(Model):
    def get_input_embeddings(self) -> None:
        return None


@pytest.mark.parametrize(("net", "options", "message"), [
    (nn.Sequential(nn.Linear(4, 4)), {}, r"a Sequential has no gradient checkpointing of its own; pass gradient_check"),
    (NoEmbeddings(), {}, r"a NoEmbeddings does not say which module embeds its inputs \(get_input_embeddings\)"),
    (Model(), {"norms": "float23"}, r"norms must be 'float32' or None, got 'float23'; did you mean 'float32'\?"),
])
def test_errors_change_nothing(net: nn.Module, options: dict, message: str) -> None:
    with pytest.raises(VeneerError, match=message):
        veneer.prepare_for_kbit_training(net, **options)
    assert all(p.requires_grad for p in net.parameters())


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=2, num_key_value_heads=2)
    net = transformers.LlamaForCausalLM(config).bfloat16().train()
    ids = torch.arange(12).view(2, 6)
    for _ in range(2):
        veneer.prepare_for_kbit_training(net)
    assert net.is_gradient_checkpointing
    assert {type(m).__name__ for m in net.modules() for p in m._parameters.values()
            if p is not None and p.dtype == torch.float32} == {"LlamaRMSNorm"}
    veneer.attach(net, LoRA(rank=2))
    net(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in veneer.trainable(net))
    veneer.detach(net)
    assert not unprepare(net).is_gradient_checkpointing
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
