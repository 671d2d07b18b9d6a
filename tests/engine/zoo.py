"""One small model with a weight of every layout, and a case for every additive method: for to_lora and combine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import veneer
from conformance.models import Experts
from conformance.toy_method import Circulant
from veneer.attach import attached
from veneer.method import Method, method_class

from .nets import scatter


class Zoo(nn.Module):
    """Token ids → embedding (11, 12), linear (9, 12), convolution (8, 9, 3), experts (3, 6, 8), experts (3, 6, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.up = nn.Linear(12, 9)
        self.conv = nn.Conv1d(9, 8, 3, padding=1)
        self.experts = Experts(turned=False)
        self.turned = Experts(turned=True)
        self.turned.w = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.up(self.embed(ids)).mT).mT
        return self.turned(self.experts(x.flatten(0, 1)))


WEIGHTS = ("embed", "up", "conv", "experts.w", "turned.w")
IDS = torch.arange(44).reshape(4, 11) * 7 % 11

#: registry key and options; looked up when a test runs
CASES = {
    "lora": ("lora", {"rank": 2, "alpha": 3}),
    "rslora": ("lora", {"rank": 2, "alpha": 3, "rank_stabilized": True}),
    "loha": ("loha", {"rank": 1, "alpha": 2}),
    "loha-dense": ("loha", {"rank": 2, "alpha": 2}),
    "loha-conv": ("loha", {"rank": 2, "effective_conv": True}),
    "lokr": ("lokr", {"rank": 8, "alpha": 12}),
    "lokr-small": ("lokr", {"rank": 1, "decompose_both": True}),
    "lokr-conv": ("lokr", {"rank": 1, "effective_conv": True}),
    "vera": ("vera", {"rank": 4, "seed": 7}),
    "vblora": ("vblora", {"rank": 2, "num_vectors": 7, "vector_length": 4}),
    "randlora": ("randlora", {"rank": 3, "alpha": 6}),
    "adalora": ("adalora", {"init_r": 3, "target_r": 2, "alpha": 2}),
    "circulant": ("circulant", {"scale": 0.5}),
}
assert Circulant.key == "circulant"


def method(case: str) -> Method:
    key, options = CASES[case]
    return method_class(key).from_options(options)


def zoo(method: Method | dict, name: str = "default", model: nn.Module | None = None) -> nn.Module:
    """The model with a trained-looking adapter on all its weights, or on those of the rules."""
    if model is None:
        torch.manual_seed(4)
        model = Zoo()
    veneer.attach(model, method if isinstance(method, dict) else dict.fromkeys(WEIGHTS, method), name=name)
    return scatter(model, name, by=0.3)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)


@torch.no_grad()
def deltas(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """ΔW (*batch, out, in) in fp64 by weight name, from the definition: the new weight minus the base's."""
    found = {}
    for weight, adapter in attached(model, name):
        W = weight.layout.matrix(weight.tensor).double()
        found[weight.name] = adapter.new_weight(W).double() - W
    return found


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())
