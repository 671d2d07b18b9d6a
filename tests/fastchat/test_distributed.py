"""Two processes over gloo give the numbers of one, also where the model is sharded."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from veneer.train.cli import main

from .test_run import losses, tensors

COMMON = ["--data_path", "data.json", "--max_steps", "4", "--logging_steps", "1", "--learning_rate", "1e-2",
          "--lr_scheduler_type", "constant", "--save_strategy", "steps", "--save_steps", "2", "--disable_tqdm", "True",
          "--lora_dropout", "0.0"]  # fmt: skip
FSDP = ["--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
# by itself accelerate shards models on accelerators only
PLAIN = ["-m", "veneer.train.cli", "--debug", "train"]
PROGRAM = {"ddp": PLAIN, "fsdp": [str(Path(__file__).with_name("sharded_on_cpu.py")), *FSDP],
           "zero2": [*PLAIN, "--deepspeed", "zero2.json"]}  # fmt: skip
OPTIMIZER = {"ddp": "optimizer.pt", "fsdp": "optimizer.bin", "zero2": "zero_to_fp32.py"}  # who has saved it
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def zero(stage: int) -> str:
    auto = dict.fromkeys(["train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"], "auto")
    config = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, **auto}
    Path(f"zero{stage}.json").write_text(json.dumps(config))
    return f"zero{stage}.json"


def in_two(kind: str, *words: str) -> str:
    """What `torchrun` of two processes prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", *PROGRAM[kind], *words]  # fmt: skip
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize(("kind", "more"), [
    ("ddp", []), ("fsdp", []), ("fsdp", ["--q_lora", "True"]), pytest.param("zero2", [], marks=needs_deepspeed),
])  # fmt: skip
def test_two_processes_give_the_numbers_of_one(
    project: Path, folders: dict[str, Path], kind: str, more: list[str]
) -> None:
    base = ["--model_name_or_path", str(folders["biases"]), "--lora_bias", "lora_only", *COMMON, *more]
    assert main(["train", *base, "--output_dir", "one", "--per_device_train_batch_size", "2"]) == 0
    spread = [*base, "--per_device_train_batch_size", "1"]
    zero(2)
    in_two(kind, *spread, "--output_dir", "two")
    one, two = tensors("one"), tensors("two")
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-4, rtol=1e-3)
    assert losses("two") == pytest.approx(losses("one"), abs=1e-4)
    names = {path.name for path in Path("two/checkpoint-2").iterdir()}
    assert names & set(OPTIMIZER.values()) == {OPTIMIZER[kind]}
    assert not any(name.startswith(("pytorch_model", "model")) for name in names)  # no byte of the base
    shutil.copytree("two/checkpoint-2", "again/checkpoint-2")
    assert "Going on from again/checkpoint-2" in in_two(kind, *spread, "--output_dir", "again")
    for key, tensor in two.items():
        torch.testing.assert_close(tensors("again")[key], tensor)


def test_stage_3_of_zero_is_refused(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model_name_or_path", str(folders["plain"]), *COMMON, "--output_dir", "out", "--deepspeed", zero(3)]
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert "--deepspeed: stage 3 of ZeRO takes weights apart in a way that adapters in place do not know" in error
