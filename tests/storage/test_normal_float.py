"""The codec of packed weights: its levels, what it keeps, what it refuses, and bitsandbytes as the measure."""

import math

import pytest
import torch

from veneer.method import VeneerError
from veneer.storage.normal_float import BITS, GROUP, encode, levels

SIZES = [(6, 64), (5, 7), (3, 21), (130, 129), (300, 1000)]


def normal(*size, seed=0, scale=0.02):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


def relative(a, b):
    return float((a - b).norm() / b.norm())


def slow(weight, bits, block):
    """The definition: each element to the nearest level of its block's largest magnitude."""
    flat = weight.flatten().tolist()
    steps, out = levels(bits).tolist(), []
    for at in range(0, len(flat), block):
        part = flat[at:at + block]
        top = max(map(abs, part)) or 1.0
        out += [top * min(steps, key=lambda level, x=x, top=top: abs(level - x / top)) for x in part]
    return torch.tensor(out).view(weight.shape)


# -- levels -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", BITS)
def test_levels_rise_from_minus_one_to_one_with_a_zero(bits):
    found = levels(bits)
    assert found.dtype == torch.float32
    assert len(found) == 2 ** bits
    assert found[0] == -1
    assert found[-1] == 1
    assert (found == 0).sum() == 1
    assert (found == 0).nonzero().item() == 2 ** (bits - 1) - 1  # one more above zero than below
    assert (found[1:] > found[:-1]).all()


def test_nf4s_printed_levels_are_quantiles_of_a_normal_distribution():
    tail = 1 - (1 / 30 + 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat([below, torch.zeros(1), above.flip(0)]) / above[0]
    assert torch.allclose(levels(4), expected.float(), rtol=0, atol=5e-7)


@pytest.mark.parametrize(("bits", "least", "most"), [(2, 0.55, 0.57), (4, 0.091, 0.093), (8, 0.0052, 0.0056)])
def test_the_error_of_normal_numbers(bits, least, most):
    """Relative, in blocks of 64. Even steps (int8) would have 0.0056."""
    W = normal(2048, 64)
    assert least < relative(encode(W, bits, double=False).decode(), W) < most


# -- what comes back ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [4, 64, 100])
@pytest.mark.parametrize("size", [(6, 64), (5, 7), (3, 21)])
def test_every_element_takes_the_nearest_level(bits, block, size):
    W = normal(*size)
    held = encode(W, bits, block, double=False)
    assert held.shape == size
    assert held.codes.dtype == torch.uint8
    assert len(held.scales) == math.ceil(W.numel() / block)
    assert held.codes.numel() == len(held.scales) * block * bits // 8
    assert torch.allclose(held.decode(), slow(W, bits, block), rtol=1e-6, atol=0)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", SIZES)
def test_what_was_decoded_is_encoded_to_itself(bits, size, double):
    W = normal(*size) * normal(size[0], 1, seed=1).mul(3).exp()
    once = encode(W, bits, double=double)
    again = encode(once.decode(), bits, double=double)
    assert same_bits(again.decode(), once.decode())
    assert torch.equal(again.codes, once.codes)
    assert torch.equal(again.absmax(), once.absmax())


def test_more_blocks_than_fit_one_piece_and_one_group():
    W = normal(1000, 700)  # three pieces, the last block not full
    held = encode(W, double=False)
    parts = [encode(W.flatten()[at:at + 64].view(1, -1), double=False).decode().flatten()
             for at in range(0, W.numel(), 64 * 997)]
    whole = held.decode().flatten()
    for i, part in enumerate(parts):
        assert same_bits(whole[i * 64 * 997:][:len(part)], part)
    assert len(encode(W).outer) == math.ceil(len(held.scales) / GROUP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_decoded_in_another_dtype_is_rounded_once(dtype):
    held = encode(normal(300, 1000))
    assert torch.equal(held.decode(dtype), held.decode().to(dtype))
    assert held.decode(dtype).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_weight_is_read(dtype):
    W = normal(64, 48).to(dtype)
    assert same_bits(encode(W).decode(), encode(W.float()).decode())


def test_a_transposed_weight_and_one_that_wants_gradients():
    W = torch.nn.Parameter(normal(48, 64))
    held = encode(W.T)
    assert same_bits(held.decode(), encode(W.detach().T.contiguous()).decode())
    assert not held.decode().requires_grad


def test_each_decode_is_a_fresh_tensor_and_the_weight_stays():
    W = normal(20, 64)
    before = W.clone()
    held = encode(W)
    first = held.decode()
    kept = first.clone()
    first.zero_()
    assert torch.equal(held.decode(), kept)
    assert torch.equal(W, before)


def test_torchs_defaults_change_nothing():
    W = normal(20, 64)
    expected = encode(W)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            held = encode(W)
            assert same_bits(held.decode(), expected.decode())
    finally:
        torch.set_default_dtype(torch.float32)


def test_decoding_compiles():
    held = encode(normal(24, 64))
    found = torch.compile(lambda x: x @ held.decode(), fullgraph=True, backend="eager")(torch.eye(24))
    assert torch.allclose(found, held.decode())


# -- zeros and outliers -------------------------------------------------------------------------------------
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_blocks_of_zeros_stay_zeros(bits, double):
    W = torch.zeros(4, 64)
    assert same_bits(encode(W, bits, double=double).decode(), W)
    W[1] = normal(64)
    found = encode(W, bits, double=double).decode()
    assert (found[[0, 2, 3]] == 0).all()
    assert (found[1] != 0).any()
    assert found.isfinite().all()


@pytest.mark.parametrize("double", [False, True])
def test_numbers_below_fp32s_normal_range_become_zeros(double):
    W = torch.full((3, 64), -1e-41)
    W[0] = 1e-36
    found = encode(W, double=double).decode()
    assert same_bits(found[1:], torch.zeros(2, 64))
    assert torch.allclose(found[0], W[0], rtol=1e-6, atol=0)
    assert same_bits(encode(found, double=double).decode(), found)


def test_a_block_too_small_for_its_group_becomes_zeros_and_stays_so():
    W = -normal(2, 64).abs()
    W[1] = -1e-12  # so far below the other's scale that 8 bits have nothing between it and zero
    found = encode(W).decode()
    assert same_bits(found[1], torch.zeros(64))
    assert same_bits(encode(found).decode(), found)


def test_doubly_quantised_scales_are_close_also_beside_an_outlier():
    W = normal(600, 64)
    exact = encode(W, double=False).absmax()
    assert ((encode(W).absmax() / exact - 1).abs() < 0.01).all()
    W[3] *= 30
    exact = encode(W, double=False).absmax()
    found = encode(W).absmax()
    assert ((found / exact - 1).abs() < 0.03).all()
    assert found.max() == exact.max()  # the largest of a group is kept as it is
    assert relative(encode(W).decode(), W) < 1.01 * relative(encode(W, double=False).decode(), W)


def test_bytes():
    held = encode(normal(512, 512))
    assert held.nbytes == 512 * 512 // 2 + 4096 + 4 * 16  # 4.127 bits an element
    assert encode(normal(512, 512), 8, double=False).nbytes == 512 * 512 + 4 * 4096


# -- bitsandbytes -------------------------------------------------------------------------------------------
def test_the_same_codes_as_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes.functional")
    W = normal(256, 320)
    codes, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=False)
    held = encode(W, double=False)
    assert torch.equal(held.scales, state.absmax)
    assert torch.equal(held.codes, codes.flatten())
    assert torch.allclose(held.decode(), bnb.dequantize_4bit(codes, state), rtol=2e-6, atol=0)


def test_doubly_quantised_about_as_good_as_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes.functional")
    W = normal(768, 640)
    codes, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = relative(bnb.dequantize_4bit(codes, state), W)
    assert relative(encode(W).decode(), W) < 1.005 * theirs


# -- refusals -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("value", "said"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_values_that_are_no_numbers_are_refused_with_their_place(value, said):
    W = normal(700, 650)
    W[650, 17] = value
    with pytest.raises(VeneerError, match=rf"the weight holds {said} at \(650, 17\)"):
        encode(W)


def test_values_beyond_fp32_are_refused():
    W = normal(4, 64).double()
    W[2, 3] = 1e300
    with pytest.raises(VeneerError, match=r"holds 1e\+300 at \(2, 3\).*beyond fp32"):
        encode(W)


@pytest.mark.parametrize(("options", "said"), [
    ({"bits": 3}, "bits must be one of 2, 4, 8, got 3"),
    ({"bits": True}, "bits must be one of 2, 4, 8, got True"),
    ({"block": 0}, "block must be a whole number of at least 1, got 0"),
    ({"block": 63}, "block=63 at 4 bits does not; use a multiple of 2, such as 64"),
    ({"block": 66, "bits": 2}, "block=66 at 2 bits does not; use a multiple of 4"),
])
def test_settings_that_are_not_possible(options, said):
    with pytest.raises(VeneerError, match=said):
        encode(normal(4, 64), **options)


@pytest.mark.parametrize(("weight", "said"), [
    (torch.zeros(4), r"a floating matrix \(out, in\) is needed, got \(4,\) torch.float32"),
    (torch.zeros(2, 3, 4), r"got \(2, 3, 4\)"),
    (torch.zeros(0, 4), r"got \(0, 4\)"),
    (torch.zeros(4, 4, dtype=torch.int8), r"got \(4, 4\) torch.int8"),
    (torch.zeros(4, 4, device="meta"), "on the meta device and has no values yet"),
])
def test_weights_that_cannot_be_encoded(weight, said):
    with pytest.raises(VeneerError, match=said):
        encode(weight)
