"""Files of models that are compiled, data-parallel or sharded are those of the bare model."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from io_models import adapted, fresh, outputs

import veneer
from veneer import DoRA, Full, LoRA

RULES = {"block.0": DoRA(LoRA(rank=2)), "block.2": LoRA(rank=2), "head": Full()}


def test_compiled_and_data_parallel(tmp_path):
    model = adapted(fresh("mixed"), {"block.*": LoRA(rank=2)})
    veneer.save(torch.compile(model), tmp_path / "a")
    veneer.save(torch.nn.DataParallel(model), tmp_path / "b")
    veneer.save(model, tmp_path / "c")
    for name in "abc":
        other = fresh("mixed")
        veneer.load(torch.nn.DataParallel(other), tmp_path / name)
        assert torch.equal(outputs(other, "mixed"), outputs(model, "mixed"))


def _worker(rank: int, path: str, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = adapted(fresh("mixed"), RULES)
    plain = outputs(model, "mixed")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    report = veneer.save(model, path)
    assert any("sharded" in note for note in report.notes)
    dist.barrier()
    with torch.no_grad():
        for param in veneer.trainable(model):
            param.zero_()
    veneer.load(model, path)  # fills the sharded parameters
    veneer.save(model, f"{path}-again")
    dist.barrier()
    for folder in (path, f"{path}-again"):
        bare = fresh("mixed")
        veneer.load(bare, folder)
        assert torch.equal(outputs(bare, "mixed"), plain)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_sharded_over_two_processes(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(_worker, args=(str(tmp_path / "a"), port), nprocs=2)
    assert sorted(f.name for f in Path(tmp_path / "a").iterdir()) == ["veneer.json", "veneer.safetensors"]
