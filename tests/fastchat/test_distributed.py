"""Two processes over gloo give the numbers of one, also where the model is sharded."""

from __future__ import annotations

import os
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


def in_two(*words: str) -> None:
    """`torchrun` of two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", "-m", "veneer.train.cli", "--debug", "train", *words]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("more", [[], FSDP], ids=["ddp", "fsdp"])
def test_two_processes_give_the_numbers_of_one(
    project: Path, folders: dict[str, Path], more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--model_name_or_path", str(folders["biases"]), "--lora_bias", "lora_only", *COMMON]
    assert main(["train", *base, "--output_dir", "one", "--per_device_train_batch_size", "2"]) == 0
    in_two(*base, *more, "--output_dir", "two", "--per_device_train_batch_size", "1")
    one, two = tensors("one"), tensors("two")
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-4, rtol=1e-3)
    assert losses("two") == pytest.approx(losses("one"), abs=1e-4)
    assert sorted(path.name for path in Path("two").glob("*.safetensors")) == ["adapter_model.safetensors"]
