"""The example of docs/coming-from-nemo.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import veneer
from veneer.nemo import LinearLoRA, PeftConfig

from .nets import Toy

PAGE = Path(__file__).parents[2] / "docs" / "coming-from-nemo.md"


def test_the_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    names = {"model": Toy(), "torch": torch, "veneer": veneer}
    exec(code, names)
    assert names["count"] == 5
    assert names["config"] == PeftConfig(target_modules=["*_proj"], dim=8, alpha=32)
    assert isinstance(names["model"].xq_proj, LinearLoRA)
    assert names["layer"].lora_B.weight.any()
