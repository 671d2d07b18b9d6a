"""Going on from a checkpoint: where a run is at its end, and what is said of one that was another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from veneer.fastchat import run
from veneer.train.cli import main

from .test_run import equal, losses, state, tensors, train, words

SAVED = ["--save_strategy", "steps", "--save_steps", "2"]


def test_a_finished_run_trains_no_step_more(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SAVED, "--max_steps", "2"]  # within an epoch, where transformers does not look before a step
    first = tensors(train(folders["plain"], *flags))
    for limit in ("2", "1"):  # 1: the checkpoint is past the limit
        capsys.readouterr()
        again = train(folders["plain"], *flags, "--max_steps", limit)
        assert f"out/checkpoint-2 is at 2 of {limit} steps already: nothing was trained" in capsys.readouterr().out
        assert (state(again)["global_step"], len(losses(again))) == (2, 2)
        assert equal(tensors(again), first)
    train(folders["plain"], *flags, "--max_steps", "3")
    assert state("out")["global_step"] == 3
    assert "nothing was trained" not in capsys.readouterr().out


def test_a_finished_run_by_epochs_says_so_too(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SAVED, "--max_steps", "-1", "--num_train_epochs", "1"]
    train(folders["plain"], *flags)
    train(folders["plain"], *flags)
    assert "out/checkpoint-4 is at 4 of 4 steps already: nothing was trained" in capsys.readouterr().out


@pytest.mark.parametrize("then", [True, False])
def test_a_base_that_is_held_otherwise_is_said(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str], then: bool) -> None:
    packed = ["--q_lora", "True", "--bf16", "True"]
    train(folders["plain"], *SAVED, *(packed if then else []))
    train(folders["plain"], *SAVED, *(packed if then else []), "--max_steps", "4")
    assert "was trained over a base held as" not in capsys.readouterr().out
    train(folders["plain"], *SAVED, *([] if then else packed), "--max_steps", "5")
    held = ["nf4, the rest in bfloat16", "float32"]
    before, here = held if then else held[::-1]
    assert (f"out/checkpoint-4 was trained over a base held as {before}, and this run holds it as {here}"
            in capsys.readouterr().out)


def test_another_template_is_said(
    project: Path, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(folders["plain"], *SAVED, "--max_steps", "2")
    record = json.loads(Path("out/checkpoint-2/run.json").read_text())
    assert record["conversation_template"] == "vicuna"
    Path("out/checkpoint-2/run.json").write_text(json.dumps({**record, "conversation_template": "model"}))
    train(folders["plain"], *SAVED)
    assert ("out/checkpoint-2 was trained on conversations in the template 'model', and this run writes them in "
            "'vicuna'") in capsys.readouterr().out


def test_the_record_of_a_finished_run_stays(project: Path, folders: dict[str, Path]) -> None:
    """Its adapter was trained over the base as it was then, whatever flags the idle run has."""
    flags = [*SAVED, "--max_steps", "2"]
    train(folders["plain"], *flags, "--q_lora", "True")
    train(folders["plain"], *flags)
    assert json.loads(Path("out/run.json").read_text())["model"]["quantize"]["scheme"] == "nf4"


def test_checkpoints_of_an_earlier_run_are_named(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    train(folders["plain"], *SAVED, "--max_steps", "4")
    assert "of an earlier run" not in capsys.readouterr().out
    train(folders["plain"], *SAVED, "--max_steps", "2", "--resume_from_checkpoint", "False")
    assert ("'out' keeps checkpoints up to checkpoint-4 of an earlier run. Until this run has saved a higher number, "
            "the next one would go on from there") in capsys.readouterr().out


def test_a_wrong_checkpoint_is_found_before_the_model_is_loaded(
    project: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "load_structure", lambda settings: pytest.fail("the model is loaded"))
    assert main(words(folders["plain"], "--resume_from_checkpoint", "out/checkpoint-9")) == 2
    assert "--resume_from_checkpoint: there is no checkpoint at 'out/checkpoint-9'" in capsys.readouterr().err
    assert main(words(folders["plain"], "--resume_from_checkpoint", str(folders["plain"]))) == 2
    assert "is no checkpoint: it needs an adapter and trainer_state.json" in capsys.readouterr().err
