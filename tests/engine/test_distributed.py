"""Two processes over gloo: gradients under DDP and FSDP2 equal those of one process with the whole batch."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from veneer import DoRA, Full, LoRA, attach


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.head = nn.Linear(16, 20)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _worker(rank: int, kind: str, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Net()
    attach(model, {"*.0": LoRA(rank=3), "*.2": DoRA(LoRA(rank=3)), "head": Full(), "embed": LoRA(rank=2, init="pissa")})
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn_like(param) * 0.1)
    ids = torch.randint(0, 20, (4, 6))
    model(ids).backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    mine = ids[2 * rank : 2 * rank + 2]
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(mine).backward()
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for _ in range(2):  # the second forward runs on weights that were resharded in between
            model.zero_grad()
            model(mine).backward()
    assert len(whole) == 2 * 2 + 2 * 3 + 2 + 2
    for name, param in model.named_parameters():
        if param.requires_grad:
            grad = param.grad.full_tensor() if kind == "fsdp2" else param.grad
            torch.testing.assert_close(grad, whole[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_of_two_processes(kind: str) -> None:
    mp.spawn(_worker, args=(kind, _free_port()), nprocs=2)
