"""A GGUF file's own blocks as the base: the dequantised model's bits, in the file's size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from veneer.method import VeneerError
from veneer.storage.gguf_blocks import BlockLinear
from veneer.train import run
from veneer.train.gguf_weights import hold_blocks, row_order
from veneer.train.model import load_model
from veneer.train.settings import ModelSettings, load_settings

pytest.importorskip("gguf", reason="pip install 'veneer[gguf]'")

from tiny_gguf import ROPE_THETA, write_tiny_gguf

IDS = torch.arange(3, 60).view(1, -1)


def load(path: Path, **options: Any) -> Any:
    return load_model(ModelSettings(name=str(path), **options))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_dequantised_model_bit_for_bit(tmp_path: Path, kind: str, dtype: str) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", kind)
    dense, held = load(path, dtype=dtype), load(path, dtype=dtype, quantize="gguf")
    found = {name: module for name, module in held.model.named_modules() if isinstance(module, BlockLinear)}
    assert len(found) == 14
    for name, module in found.items():
        assert torch.equal(module.read(), dense.model.get_submodule(name).weight), name
    assert torch.equal(logits(held.model), logits(dense.model))
    assert held.model.config.rope_parameters["rope_theta"] == ROPE_THETA
    assert "14 weights held as blocks of the file" in held.notes[0]
    q_proj, file = found["model.layers.0.self_attn.q_proj"].weight, path.read_bytes()
    assert all(row.numpy().tobytes() in file for row in q_proj), "the bytes of the file"
    assert q_proj.numpy().tobytes() not in file, "in another order"


def test_adapters_train_on_it_as_on_the_dequantised_one(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    grads = []
    for options in ({}, {"quantize": "gguf"}):
        model = load(path, **options).model.train()
        veneer.attach(model, veneer.LoRA(rank=2))
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in veneer.trainable(model)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_whole_run(project: Path) -> None:
    write_tiny_gguf(project / "tiny.gguf")
    settings = load_settings("config.yaml", ["model=./tiny.gguf", "model.quantize=gguf", "training.max_steps=3",
                                             "evaluation.generate=false"])
    results = run.train(settings)
    assert results is not None
    assert [(check.name, check.passed) for check in results.checks] == [("reload", True), ("merge", True)]


def test_what_the_file_holds_otherwise_is_left_and_named(tmp_path: Path) -> None:
    loaded = load(write_tiny_gguf(tmp_path / "tiny.gguf", dense="ffn_up"), quantize="gguf")
    assert type(loaded.model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert loaded.notes[1:] == ("left as it is: 'model.layers.0.mlp.up_proj': the file holds it as F16 and 1 more",)


def test_another_files_numbers_are_not_taken(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    model = load(path).model
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1
    report = hold_blocks(model, path)
    assert report.weights == 13
    assert report.skipped == ("'model.layers.1.mlp.up_proj': the model holds other numbers than the file",)
    with pytest.raises(VeneerError, match=r"tiny.gguf: no linear weight can be held as the file has it. 'model.lay"):
        hold_blocks(model, path)


def test_rows_are_found_in_any_order() -> None:
    stored = torch.randn(9, 4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(row_order(stored, stored[order]), order)
    assert torch.equal(row_order(stored, stored), torch.arange(9))
    assert row_order(stored, stored[:, [1, 0, 2, 3]]) is None
    assert row_order(stored, stored[:8]) is None


@pytest.mark.slow
def test_the_embedded_model_in_its_own_blocks() -> None:
    dense, held = (load_model(ModelSettings(name="smollm2-135m", quantize=q)).model for q in (None, "gguf"))
    assert held.config.rope_parameters["rope_theta"] == ROPE_THETA
    assert sum(isinstance(module, BlockLinear) for module in held.modules()) == 210
    assert torch.equal(logits(held), logits(dense))
