from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from tiny import chat_rows, tiny_model, write_jsonl

import veneer
from veneer.method import VeneerError
from veneer.train import run, trainer
from veneer.train.adapter_checkpoints import DivergedError
from veneer.train.model import load_model
from veneer.train.settings import load_settings

QUIET = ["output.check_reload=false", "output.check_merge=false", "output.report=false", "evaluation.generate=false"]


def train(*overrides: str, resume: str | None = None) -> Any:
    return run.train(load_settings("config.yaml", [*QUIET, *overrides]), resume=resume)


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    (file,) = [f for f in Path(folder).iterdir() if f.suffix == ".safetensors"]
    return safetensors.torch.load_file(file)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_resumed_run_equals_the_uninterrupted_one(project: Path) -> None:
    # dropout makes the random state matter, 3 epochs the data order, accumulation the place inside a step
    options = ["adapter.dropout=0.2", "training.epochs=3", "training.save_every=4", "training.keep_checkpoints=9",
               "training.batch_size=3", "training.gradient_accumulation=2", "evaluation.every=4"]  # fmt: skip
    whole = train(*options)
    assert [row["step"] for row in whole.metrics if "loss" in row] == list(range(1, 13))
    shutil.copytree("out/checkpoint-4", "second/checkpoint-4")
    shutil.copy("out/metrics.jsonl", "second/metrics.jsonl")
    again = train(*options, "output.directory=second", resume="last")
    assert equal(tensors("out/adapter"), tensors("second/adapter"))
    losses = [{row["step"]: row["loss"] for row in r.metrics if "loss" in row} for r in (whole, again)]
    assert losses[0] == losses[1]
    assert not equal(tensors("out/checkpoint-4"), tensors("out/adapter"))


def test_a_finished_run_that_is_resumed_trains_no_step_more(project: Path) -> None:
    options = ["training.max_steps=4", "training.save_every=4"]
    train(*options)
    first = tensors("out/adapter")
    again = train(*options, "output.overwrite=true", resume="last")
    assert dict(again.facts)["Steps"] == "4 of 4"
    assert [row["step"] for row in again.metrics if "loss" in row] == [1, 2, 3, 4]
    assert equal(tensors("out/adapter"), first)


@pytest.mark.parametrize("residual", ["exact", "base"])
def test_a_start_that_is_carried_is_resumed_bit_for_bit(project: Path, residual: str) -> None:
    path = project / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["adapter"] |= {"init": "pissa", "residual": residual}
    path.write_text(yaml.safe_dump(config))
    options = ["training.epochs=2", "training.save_every=3", "training.keep_checkpoints=9", "training.batch_size=3"]
    train(*options)
    shutil.copytree("out/checkpoint-3", "second/checkpoint-3")
    shutil.copy("out/metrics.jsonl", "second/metrics.jsonl")
    train(*options, "output.directory=second", resume="last")
    assert equal(tensors("out/adapter"), tensors("second/adapter"))


def adalora(project: Path, **options: Any) -> None:
    """Let the project's config say AdaLoRA, without a number of steps."""
    path = project / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["adapter"] = {"method": "adalora", "init_r": 4, "target_r": 2, **options}
    path.write_text(yaml.safe_dump(config))


def test_a_schedule_gets_the_steps_of_the_run_and_is_resumed(project: Path) -> None:
    adalora(project)
    options = ["training.epochs=3", "training.save_every=5", "training.keep_checkpoints=9", "training.batch_size=3",
               "training.gradient_accumulation=2"]  # fmt: skip
    train(*options)
    assert {"progress.safetensors"} == {p.name for p in Path("out/checkpoint-5").glob("prog*")}
    assert not list(Path("out/adapter").glob("prog*")), "it is no part of the adapter"
    (method,) = veneer.info("out/adapter").adapters[0].methods
    assert "total_step=12" in method
    shutil.copytree("out/checkpoint-5", "second/checkpoint-5")
    shutil.copy("out/metrics.jsonl", "second/metrics.jsonl")
    train(*options, "output.directory=second", resume="last")
    for folder, count in (("adapter", 1), ("checkpoint-10", 2)):
        files = sorted((Path("out") / folder).glob("*.safetensors"))
        assert len(files) == count
        for file in files:
            again = safetensors.torch.load_file(Path("second") / folder / file.name)
            assert equal(safetensors.torch.load_file(file), again), file
    fresh = load_model(load_settings("config.yaml").model).model
    veneer.load(fresh, "out/adapter")
    adapters = veneer.adapters(fresh)["default"].weights.values()
    assert sum(int(a.mask.sum()) for a in adapters) == 2 * len(adapters)  # type: ignore[union-attr, operator, arg-type]


def test_a_checkpoint_without_its_progress_is_told(project: Path) -> None:
    adalora(project)
    train("training.save_every=3", "training.keep_checkpoints=9")
    Path("out/checkpoint-3/progress.safetensors").unlink()
    with pytest.raises(VeneerError, match=r"checkpoint 'out/checkpoint-3' has no progress.safetensors"):
        train("training.save_every=3", resume="out/checkpoint-3")


def test_a_schedule_that_is_too_long_is_told_before_training(project: Path) -> None:
    adalora(project, tinit=4, tfinal=2)
    with pytest.raises(VeneerError, match="no steps are left to cut ranks in: of total_step=6"):
        train()
    assert not Path("out/metrics.jsonl").exists()


def test_checkpoints_hold_the_adapter_and_no_base(project: Path) -> None:
    train("training.save_every=3", "training.keep_checkpoints=1")
    assert [p.name for p in sorted(project.glob("out/checkpoint-*"))] == ["checkpoint-6"]
    names = {p.name for p in Path("out/checkpoint-6").iterdir()}
    assert "model.safetensors" not in names
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "veneer.json"} <= names
    base = sum(p.numel() * 4 for p in tiny_model_parameters(project))
    assert sum(t.numel() * 4 for t in tensors("out/checkpoint-6").values()) < base / 4
    assert equal(tensors("out/checkpoint-6"), tensors("out/adapter"))


def tiny_model_parameters(project: Path) -> list[torch.nn.Parameter]:
    import transformers

    settings = load_settings("config.yaml")
    return list(transformers.AutoModelForCausalLM.from_pretrained(settings.model.name).parameters())


def test_the_best_checkpoint_is_kept_and_loaded(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0])
    real = trainer.heldout_loss
    monkeypatch.setattr(trainer, "heldout_loss", lambda *a, **k: (next(losses) * real(*a, **k)[1], real(*a, **k)[1]))
    found = train("training.save_every=2", "training.keep_checkpoints=9", "evaluation.every=2",
                  "evaluation.keep_best=true")  # fmt: skip
    assert dict(found.facts)["Best checkpoint"] == "checkpoint-4, held-out loss 1.0000"
    assert equal(tensors("out/adapter"), tensors("out/checkpoint-4"))
    assert not equal(tensors("out/adapter"), tensors("out/checkpoint-6"))


def test_nan_loss_stops_and_loses_nothing(project: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    real = trainer.masked_loss

    def poisoned(model: Any, *args: Any) -> Any:
        total, count, outputs = real(model, *args)
        seen.append({k: v.detach().clone() for k, v in model.state_dict().items() if "adapters" in k})
        return total * float("nan") if len(seen) == 5 else total, count, outputs

    monkeypatch.setattr(trainer, "masked_loss", poisoned)
    with pytest.raises(DivergedError) as caught:
        train("training.save_every=3")
    message = str(caught.value)
    assert "training stopped in step 5 of 6: the loss is nan at learning rate 0.00" in message
    assert "The step was not taken: the adapter as it was before this step is in 'out/last_good'" in message
    assert "the last checkpoint is 'out/checkpoint-3'" in message
    assert "a lower training.learning_rate" in message
    for folder, step in (("out/last_good", 5), ("out/checkpoint-3", 4)):
        fresh = tiny_model(tokenizer)
        veneer.load(fresh, folder)
        found = {k: v for k, v in fresh.state_dict().items() if "adapters" in k}
        assert equal(found, seen[step - 1]), folder
    assert len(Path("out/metrics.jsonl").read_text().splitlines()) == 4


def test_infinite_gradient_stops_before_the_optimizer(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = trainer.masked_loss, []

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * float("inf")

    def poisoned(*args: Any) -> Any:
        total, count, outputs = real(*args)
        calls.append(1)
        return Overflow.apply(total) if len(calls) == 2 else total, count, outputs

    monkeypatch.setattr(trainer, "masked_loss", poisoned)
    with pytest.raises(DivergedError, match=r"in step 2 of 6: the loss is finite but its gradient is not, at learning"):
        train()
    assert all(t.isfinite().all() for t in tensors("out/last_good").values())


def test_accumulated_batches_weigh_every_token_alike(project: Path) -> None:
    write_jsonl(project / "train.jsonl", chat_rows(8))
    found = []
    for directory, size, count in (("one", 8, 1), ("two", 2, 4)):
        train("training.optimizer=sgd", "training.learning_rate=1.0", "training.max_steps=1",
              "training.warmup_ratio=0", "training.max_grad_norm=0", f"training.batch_size={size}",
              f"training.gradient_accumulation={count}", f"output.directory={directory}")  # fmt: skip
        found.append(tensors(f"{directory}/adapter"))
    moved = 0.0
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-4, atol=1e-6)
        moved += float(value.abs().max()) if "lora_B" in key or key.endswith("B") else 0.0
    assert moved > 1e-3, "a step that moves nothing would pass any comparison"


def test_time_limit_ends_the_run_and_is_told(project: Path) -> None:
    found = train("training.max_minutes=1e-7")
    assert dict(found.facts)["Steps"] == "1 of 6"
    assert "stopped by training.max_minutes 1e-07" in dict(found.facts)["Note"]


def test_a_slow_run_follows_the_schedule_by_the_clock(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(trainer.time, "monotonic", lambda: 15.0 * next(clock))  # half a minute or so for each step
    options = ["training.epochs=10", "training.warmup_ratio=0", "training.schedule=linear"]
    slow = train(*options, "training.max_minutes=5")
    rates = [row["learning_rate"] for row in slow.metrics if "loss" in row]
    assert len(rates) < 60
    assert rates[-1] < 0.2 * rates[0], "come down although most steps are still to do"
    assert all(a > b for a, b in itertools.pairwise(rates))
    monkeypatch.undo()
    monkeypatch.chdir(project)
    fast = train("training.max_minutes=60", "output.directory=fast")
    free = train("output.directory=free")
    assert [r["learning_rate"] for r in fast.metrics] == [r["learning_rate"] for r in free.metrics]


def test_other_methods_and_rules(project: Path) -> None:
    rules = "{'*.q_proj': {method: dora, inner: {method: lora, rank: 2}}, '*.mlp.*': {method: lora, rank: 2}}"
    text = (project / "config.yaml").read_text().replace("method: lora\n  rank: 4", f"rules: {rules}")
    (project / "config.yaml").write_text(text)
    assert "rules:" in text
    found = train("output.check_reload=true", "output.check_merge=true")
    assert [(check.name, check.passed) for check in found.checks] == [("reload", True), ("merge", True)]


@pytest.mark.slow
def test_two_processes_take_the_same_step_as_one(project: Path) -> None:
    """DDP over gloo: the batch of each process is half of the single process's batch."""
    options = [*QUIET, "training.optimizer=sgd", "training.learning_rate=0.5", "training.max_grad_norm=0",
               "training.save_every=2"]  # fmt: skip
    sets = [part for option in options for part in ("--set", option)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "veneer.train.cli"]
    last = ["--set", "training.batch_size=4", "--set", "output.directory=two"]
    command = [*launch, "train", "config.yaml", *sets, *last]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Held out after training") == 1, "only the first process prints"
    single = run.train(load_settings("config.yaml", [*options, "training.batch_size=8", "output.directory=one"]))
    first, second = tensors("one/adapter"), tensors("two/adapter")
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-4, atol=1e-6)
    rows = [json.loads(line) for line in Path("two/metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in single.metrics], rel=1e-4)
