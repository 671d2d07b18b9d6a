"""Bytes times scales: the bits of the plain product, in any number of pieces."""

from __future__ import annotations

import pytest
import torch

import veneer
from veneer.storage import byte_codes
from veneer.weights import scan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("piece", [1, 100, 2**17])
def test_the_bits_of_the_plain_product(codes: torch.dtype, dtype: torch.dtype, piece: int,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_codes, "_PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    every = torch.randint(0, 256, (37, 24), dtype=torch.uint8, generator=generator)
    every.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
    held, scales = every.view(codes), torch.rand(37, 1, generator=generator)
    want = (held.float() * scales).to(dtype)
    got = byte_codes.scaled(held, scales, dtype)
    assert got.dtype == dtype
    assert torch.equal(got.nan_to_num(123.0), want.nan_to_num(123.0))


@pytest.mark.parametrize(("scheme", "options"), [("torchao-int8", {}), ("torchao-int8", {"group_size": 16}),
                                                 ("torchao-fp8", {})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchaos_own_reading_has_the_same_bits(scheme: str, options: dict, dtype: torch.dtype) -> None:
    pytest.importorskip("torchao")
    layer = torch.nn.Linear(64, 48).to(dtype)
    model = torch.nn.Sequential(layer)
    veneer.quantize(model, scheme, "0", **options)
    weight = model[0].weight
    read = next(w for w in scan(model) if w.storage is not None).storage.read(model[0], dtype)
    assert torch.equal(read, weight.dequantize(output_dtype=dtype))
