"""Statistics as a thing of their own: their file, the model they are of, and several of them as one."""

from __future__ import annotations

import os
import re
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import veneer
from veneer import LoRA
from veneer.calibrate import calibrate
from veneer.io.tensors import read_tensors
from veneer.method import VeneerError
from veneer.statistics import Statistics

from .calibrating import Attention, cut, found, tokens

KINDS = {"eva": "inputs", "corda": "covariance", "lora_ga": "gradient"}
each = pytest.mark.parametrize("init", KINDS)
NAMES = ("q", "k", "o")


def rules(init):
    return dict.fromkeys(NAMES, LoRA(rank=2, init=init))


def made(init="eva", seed=0, batch=None, **options):
    torch.manual_seed(seed)
    model = Attention()
    return model, found(model, [tokens(16) if batch is None else batch], rules(init), **options)


def message_of(function, *args):
    with pytest.raises(VeneerError) as caught:
        function(*args)
    return re.sub(r"\s+", " ", str(caught.value))


# -- the file -----------------------------------------------------------------------------------------------
@each
def test_save_and_load(init, tmp_path):
    model, statistics = made(init)
    path = statistics.save(tmp_path / "new" / "data.safetensors")
    again = Statistics.load(path)
    assert again.kinds == statistics.kinds == dict.fromkeys(NAMES, KINDS[init])
    assert again.tokens == statistics.tokens == 160
    assert list(again) == list(statistics)
    for name in NAMES:
        assert again[name].keys() == statistics[name].keys()
        for key, tensor in statistics[name].items():
            assert torch.equal(again[name][key], tensor)
            assert again[name][key].dtype == tensor.dtype
    again.check(model)
    assert str(again) == str(statistics)


def test_a_file_holds_what_is_shared_once(tmp_path):
    _, statistics = made("corda")
    path = statistics.save(tmp_path / "data.safetensors")
    tensors, _ = read_tensors(path)
    assert sorted(tensors) == ["o/count", "o/covariance", "q/count", "q/covariance"]
    again = Statistics.load(path)
    assert again["k"]["covariance"] is again["q"]["covariance"]
    assert again.size() == statistics.size() == 2 * (12 * 12 * 4 + 8)


def test_attaching_from_a_file_is_attaching(tmp_path):
    for init in KINDS:
        model, statistics = made(init)
        path = statistics.save(tmp_path / f"{init}.safetensors")
        veneer.attach(model, rules(init), statistics=Statistics.load(path))
        torch.manual_seed(0)
        other = veneer.attach(Attention(), rules(init), statistics=statistics)
        for (name, mine), (_, theirs) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
            assert torch.equal(mine, theirs), name


def test_files_that_are_none(tmp_path):
    assert "there is no statistics file at" in message_of(Statistics.load, tmp_path / "none.safetensors")
    model = veneer.attach(Attention(), {"q": LoRA(rank=2)})
    veneer.save(model, tmp_path / "adapter")
    text = message_of(Statistics.load, tmp_path / "adapter" / "adapter_model.safetensors")
    assert "holds no statistics of veneer.calibrate but an adapter" in text
    _, statistics = made()
    path = statistics.save(tmp_path / "data.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    text = message_of(Statistics.load, path)
    assert "not a complete safetensors file" in text
    assert "its header announces" in text
    assert "whose name ends in .safetensors, got" in message_of(statistics.save, tmp_path / "data.pt")
    assert not (tmp_path / "data.pt").exists()


def test_a_file_of_a_newer_version(tmp_path):
    _, statistics = made()
    statistics.kinds["q"] = "hessian"
    path = statistics.save(tmp_path / "data.safetensors")
    assert "was written by a newer version of Veneer" in message_of(Statistics.load, path)


# -- the model they are of ----------------------------------------------------------------------------------
@each
def test_statistics_of_another_model(init, tmp_path):
    _, statistics = made(init)
    statistics = Statistics.load(statistics.save(tmp_path / "data.safetensors"))
    torch.manual_seed(5)
    text = message_of(statistics.check, Attention())
    assert text.startswith("these statistics are of another model: base weight 'q' has other values than the one these "
                           "statistics were made for; base weight 'k'")
    assert text.endswith("Collect them on this one with veneer.calibrate")
    assert "base weight 'q' is (14, 14) here and was (12, 12)" in message_of(statistics.check, Attention(width=14))
    assert "base weight 'q' (12, 12) is not in this model" in message_of(statistics.check, torch.nn.Linear(12, 12))


def test_attach_refuses_statistics_of_another_model():
    _, statistics = made()
    torch.manual_seed(5)
    model = Attention()
    assert "these statistics are of another model: base weight 'q' has other values" in \
        message_of(lambda: veneer.attach(model, rules("eva"), statistics=statistics))
    assert type(model.q) is torch.nn.Linear


def test_the_same_model_in_another_form_passes():
    model, statistics = made()
    statistics.check(model)
    statistics.check(model.to(torch.bfloat16))
    veneer.attach(model, rules("eva"), statistics=statistics)
    statistics.check(model)
    model, statistics = made()
    with torch.no_grad():
        model.v.weight.zero_()  # not among those that were looked at
    statistics.check(model)
    torch.manual_seed(0)
    model = Attention(width=64)
    statistics = found(model, [tokens()], rules("corda"))
    veneer.quantize(model, "nf4")
    statistics.check(model)


# -- several as one -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_merged_sums_are_those_of_all_data(init):
    torch.manual_seed(0)
    model, batch = Attention(), tokens(16)
    whole = found(model, [batch], rules(init), compress=False)
    parts = [found(model, [part], rules(init), compress=False) for part in cut(batch, 5)]
    merged = Statistics.merged(parts)
    assert merged.tokens == 160
    assert merged.kinds == whole.kinds
    key = {"corda": "covariance", "lora_ga": "gradient"}[init]
    for name in NAMES:
        assert torch.allclose(merged[name][key], whole[name][key], rtol=1e-4, atol=1e-5)
        assert float(merged[name]["count"]) == float(whole[name]["count"])
    if init == "corda":
        assert merged["q"]["covariance"] is merged["k"]["covariance"]
    again = Statistics.merged(parts)
    assert all(torch.equal(merged[name][key], again[name][key]) for name in NAMES)


def test_merged_components_are_near_those_of_all_data():
    torch.manual_seed(0)
    model, batch = Attention(), tokens(64)
    method = dict.fromkeys(NAMES, LoRA(rank=5, init="eva"))
    whole = found(model, [batch], method)
    merged = Statistics.merged([found(model, [part], method) for part in cut(batch, 20)])
    for name in NAMES:
        a, b = merged[name], whole[name]
        assert torch.allclose(a["mean"], b["mean"], atol=1e-5)
        assert float(a["total"]) == pytest.approx(float(b["total"]), rel=1e-4)
        assert int(a["count"]) == int(b["count"]) == 640
        assert torch.allclose(a["singular"], b["singular"], rtol=0.02)
        assert torch.allclose(a["components"] @ a["components"].T, torch.eye(10), atol=1e-5)
        assert float(torch.linalg.svdvals(a["components"][:5] @ b["components"][:5].T).min()) > 0.99


def test_merged_triplets_are_those_of_the_mean():
    torch.manual_seed(0)
    model, batch = Attention(), tokens(16)
    parts = [found(model, [part], rules("lora_ga")) for part in cut(batch, 6)]
    merged = Statistics.merged(parts)["o"]
    dense = [part["o"]["left"] * part["o"]["singular"] @ part["o"]["right"] for part in parts]
    shares = [part["o"]["count"] / 160 for part in parts]
    mean = sum(s * d for s, d in zip(shares, dense, strict=True))
    U, S, V = torch.linalg.svd(mean)
    assert torch.allclose(merged["singular"], S[:4], rtol=1e-3)
    assert torch.allclose(merged["left"] * merged["singular"] @ merged["right"], U[:, :4] * S[:4] @ V[:4],
                          atol=1e-4 * float(S[0]))


def test_what_cannot_be_merged():
    model, eva = made("eva")
    _, corda = made("corda")
    assert "'q' has the statistic 'inputs' in one part and 'covariance' in another" in \
        message_of(Statistics.merged, [eva, corda])
    _, other = made("eva", seed=3)
    assert "these statistics are of different models: 'q' differs" in message_of(Statistics.merged, [eva, other])
    more = found(model, [tokens()], dict.fromkeys(NAMES, LoRA(rank=3, init="eva")))
    assert "statistics of 4 and of 6 components cannot be merged" in message_of(Statistics.merged, [eva, more])
    _, whole = made("lora_ga", compress=False)
    _, short = made("lora_ga")
    assert "whole gradients and leading triplets of gradients cannot be merged" in \
        message_of(Statistics.merged, [whole, short])
    assert "needs at least one" in message_of(Statistics.merged, [])


def _worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, batch = Attention(), tokens(16)
    mine = {key: value[8 * rank:8 * rank + 8] for key, value in batch.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for init in KINDS:
            statistics = calibrate(model, [mine], rules(init)).gathered()
            veneer.attach(model, rules(init), name=init, statistics=statistics)
            statistics.save(f"{folder}/{init}-{rank}.safetensors")
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_same_bits(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(_worker, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    torch.manual_seed(0)
    model, batch = Attention(), tokens(16)
    whole = found(model, [batch], rules("corda"))
    gathered = Statistics.load(tmp_path / "corda-1.safetensors")
    assert gathered.tokens == 160
    assert torch.allclose(gathered["o"]["covariance"], whole["o"]["covariance"], rtol=1e-5, atol=1e-5)


def test_one_process_gathers_itself():
    _, statistics = made()
    assert statistics.gathered() is statistics
