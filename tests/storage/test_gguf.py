"""GGUF blocks: our reading beside the gguf package's, bit for bit, and layers that hold them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import veneer
from veneer import LoRA
from veneer.method import VeneerError
from veneer.storage import gguf_codec
from veneer.storage.gguf_blocks import BlockLinear, gguf_linear

from .layers import read
from .test_libraries import shake

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")

#: where a block has fp16 numbers; all else may be any bits
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2],
          "Q6_K": [208], "Q3_K": [108], "IQ4_XS": [0]}


def random_blocks(name: str, rows: int, blocks: int) -> tuple[int, torch.Tensor]:
    kind = gguf.GGMLQuantizationType[name]
    generator = np.random.default_rng(0)
    made = generator.integers(0, 256, (rows * blocks, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for at in HALVES[name]:
        made[:, at:at + 2] = generator.standard_normal(len(made)).astype(np.float16).view(np.uint8).reshape(-1, 2)
    return int(kind), torch.from_numpy(made.reshape(rows, -1))


@pytest.mark.parametrize("name", HALVES)
def test_reading_has_the_bits_of_the_gguf_package(name: str) -> None:
    number, blocks = random_blocks(name, 24, 3)
    want = torch.from_numpy(quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(number)))
    found = gguf_codec.decode(blocks, number, torch.float32)
    assert torch.equal(found, want)
    assert torch.equal(gguf_codec.decode(blocks, number, torch.bfloat16), want.bfloat16())
    assert (gguf_codec.kind_of(number).numbers, gguf_codec.kind_of(number).bytes) == \
        gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]


def test_reading_in_pieces_is_reading_at_once(monkeypatch) -> None:
    number, blocks = random_blocks("Q4_1", 24, 3)
    whole = gguf_codec.decode(blocks, number, torch.float32)
    monkeypatch.setattr(gguf_codec, "_CHUNK", 160)
    assert torch.equal(gguf_codec.decode(blocks, number, torch.float32), whole)


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "IQ4_XS"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_of_blocks(name: str, device: str) -> None:
    per = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0]
    number, blocks = random_blocks(name, 32, 256 // per)
    layer = nn.Linear(256, 32, dtype=torch.bfloat16, device=device)
    if device == "meta":
        layer.bias = nn.Parameter(torch.zeros(32, dtype=torch.bfloat16))
    net = nn.Sequential(gguf_linear(layer, blocks, number), nn.Tanh())
    assert isinstance(net[0], BlockLinear)
    assert name in repr(net)
    weight = read(net[0])
    assert weight.dtype == torch.bfloat16
    x = torch.randn(3, 256, dtype=torch.bfloat16, requires_grad=True)
    assert torch.equal(net[0](x), nn.functional.linear(x, weight, net[0].bias))
    veneer.attach(net, LoRA(rank=2))
    shake(net)
    net(x).float().sum().backward()
    assert x.grad is not None
    half = net.float()
    assert read(half[0]).dtype == torch.float32
    assert torch.equal(half[0].weight, blocks.view(32, -1))


def test_rows_can_be_reordered_packed() -> None:
    number, blocks = random_blocks("Q4_1", 32, 2)
    order = torch.randperm(32)
    plain, turned = (gguf_linear(nn.Linear(64, 32), each, number) for each in (blocks, blocks[order]))
    assert torch.equal(turned.read(), plain.read()[order])


@pytest.mark.parametrize(("size", "shape", "number", "words"), [
    ((64, 32), (32, 40), 3, None),
    ((64, 32), (32, 36), 3, r"a weight \(32, 64\) in Q4_1 is uint8 blocks of 20 bytes for 32 numbers each"),
    ((48, 32), (32, 30), 3, r"a weight \(32, 48\) in Q4_1"),
    ((64, 32), (32, 40), 1, r"ggml type 1 \(F16\) is no kind of packed block; known are 2 \(Q4_0\)"),
    ((64, 32), (32, 40), 999, "ggml type 999 is no kind of packed block"),
])
def test_blocks_that_do_not_fit(size, shape, number: int, words: str | None) -> None:
    layer, blocks = nn.Linear(*size), torch.zeros(shape, dtype=torch.uint8)
    if words is None:
        assert not gguf_linear(layer, blocks, number).read().any()
        return
    with pytest.raises(VeneerError, match=words):
        gguf_linear(layer, blocks, number)
    assert type(layer) is nn.Linear


def test_only_a_linear_layer_holds_blocks() -> None:
    with pytest.raises(VeneerError, match=r"only an nn\.Linear itself can hold GGUF blocks, and this is a Conv1d"):
        gguf_linear(nn.Conv1d(4, 4, 1), torch.zeros(4, 4, dtype=torch.uint8), 3)


def test_a_kind_that_nobody_writes_is_not_quantised_again() -> None:
    number, blocks = random_blocks("Q6_K", 32, 1)
    layer = gguf_linear(nn.Linear(256, 32), blocks, number)
    storage = veneer.storage.packed_storage(layer)
    with pytest.raises(VeneerError, match="held as GGUF Q6_K cannot be quantised again; merge it into dense numbers"):
        storage.encode(layer, layer.read())
    number, blocks = random_blocks("Q8_0", 32, 1)
    layer = gguf_linear(nn.Linear(32, 32), blocks, number)
    held = storage.encode(layer, layer.read())
    assert (storage.decode(layer, held, torch.float32) - layer.read()).norm() < 0.01 * layer.read().norm()
    before = storage.swap(layer, held)
    assert torch.equal(layer.weight, held)
    assert torch.equal(before, blocks)
