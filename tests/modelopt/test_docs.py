"""The example of docs/coming-from-modelopt.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import veneer.modelopt as mtpeft
from veneer.inspect.summary import adapters

from .nets import Toy

PAGE = Path(__file__).parents[2] / "docs" / "coming-from-modelopt.md"


def test_the_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    model, x = Toy(), torch.randn(2, 16)
    exec(code, {"model": model})
    restored = mtpeft.restore(Toy(), tmp_path / "state")
    assert torch.equal(restored(x), model(x))
    assert {name: {n: a.rank for n, a in found.weights.items()} for name, found in adapters(restored).items()} == {
        "first": {"self_attention.linear_qkv": 16, "self_attention.linear_proj": 16, "mlp.linear_fc1": 32,
                  "mlp.linear_fc2": 32},
        "second": {"mlp.linear_fc1": 4, "mlp.linear_fc2": 4}}
