from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny import chat_rows, tiny_model, write_jsonl

import veneer
from veneer.method import VeneerError
from veneer.train.cli import main
from veneer.train.model import load_model
from veneer.train.serve import Chat, base_settings
from veneer.train.settings import ModelSettings

# libraries of the extras, made unimportable
BLOCK = (
    "import sys\n"
    "for name in ('transformers','accelerate','rich','yaml','jinja2','matplotlib','gguf'): sys.modules[name] = None\n"
)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.fixture
def trained(project: Path) -> Path:
    assert main(["train", "config.yaml", "--set", "training.epochs=2", "--set", "evaluation.generate=false"]) == 0
    return project / "out" / "adapter"


def test_errors_are_one_message_and_exit_code_2(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "config.yaml", "--set", "training.learing_rate=1"]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("veneer: error: unknown key 'learing_rate' in training; did you mean 'learning_rate'?")
    assert "Traceback" not in out.err
    assert main(["train"]) == 2
    assert "veneer train needs a YAML file; examples/demo.yaml is one" in capsys.readouterr().err
    with pytest.raises(VeneerError, match="unknown key 'learing_rate'"):
        main(["--debug", "train", "config.yaml", "--set", "training.learing_rate=1"])


def test_wrong_rows_reach_the_user(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(project / "train.jsonl", [*chat_rows(2), {"mesages": []}])
    assert main(["train", "config.yaml"]) == 2
    assert "train.jsonl:3: no known form; its fields: 'mesages'; did you mean 'messages'?" in capsys.readouterr().err


def test_failed_checks_give_exit_code_2(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.train.checks.MERGE_BAR", dict.fromkeys(veneer_dtypes(), -1.0))
    assert main(["train", "config.yaml", "--set", "evaluation.generate=false"]) == 2
    assert "training ended, but these checks of its result failed: merge" in capsys.readouterr().err


def veneer_dtypes() -> list[Any]:
    import torch

    return [torch.float32]


def test_resume_may_stand_before_the_config(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", "config.yaml"]) == 2
    assert "--resume: there is no checkpoint 'last' in 'out'" in capsys.readouterr().err


def test_print_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--print-schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "veneer train"


def test_plan_of_config_and_of_model(project: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "config.yaml", "--set", "adapter.rank=2"]) == 0
    by_config = capsys.readouterr().out
    assert "LoRA(rank=2)" in by_config
    assert "14 of 15" in by_config
    assert "3,712 trainable" in by_config
    assert main(["plan", "--model", str(model_folder), "--option", "rank=2"]) == 0
    assert capsys.readouterr().out == by_config
    assert main(["plan", "--model", str(model_folder), "--target", "*.q_porj"]) == 2
    assert "q_proj" in capsys.readouterr().err
    assert main(["plan"]) == 2
    assert "either a YAML file or --model" in capsys.readouterr().err
    assert main(["plan", "--model", str(project / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_info(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["info", str(trained)]) == 0
    assert "14" in capsys.readouterr().out
    assert main(["info", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_info_and_import_without_the_train_extra(trained: Path) -> None:
    done = python(f"{BLOCK}from veneer.train.cli import main\nsys.exit(main(['info', {str(trained)!r}]))")
    assert done.returncode == 0, done.stderr
    loaded = python(
        "import sys, veneer, veneer.train.cli\n"
        "print([m for m in ('transformers', 'rich', 'yaml', 'jinja2', 'peft') if m in sys.modules])"
    )
    assert loaded.stdout.strip() == "[]", loaded.stderr


@pytest.mark.parametrize(
    ("missing", "extra"), [("yaml", "train"), ("transformers", "train"), ("accelerate", "train"), ("rich", "train")]
)
def test_a_missing_extra_is_named(project: Path, missing: str, extra: str) -> None:
    code = f"import sys\nsys.modules[{missing!r}] = None\nfrom veneer.train.cli import main\n"
    done = python(code + "sys.exit(main(['train', 'config.yaml']))")
    assert done.returncode == 2
    assert f"needs the library {missing!r}, which is not installed" in done.stderr
    assert f"pip install 'veneer[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_merge_gives_a_plain_model(trained: Path, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(trained), "--output", "merged"]) == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained("merged").eval()
    assert not any("adapters" in key for key in plain.state_dict())
    settings = base_settings(str(trained), None, None)
    adapted = load_model(settings)
    veneer.load(adapted.model, trained)
    ids = adapted.tokenizer("say aa", return_tensors="pt")["input_ids"]
    expected, found = (m(input_ids=ids).logits.detach() for m in (adapted.model, plain))
    bare = load_model(settings).model(input_ids=ids).logits.detach()
    scale = expected.abs().max()
    assert (found - expected).abs().max() / scale < 1e-5
    assert (bare - expected).abs().max() / scale > 1e-2, "the adapter must matter for this to say anything"
    assert main(["merge", str(trained), "--output", "merged"]) == 2
    assert "--output 'merged' is there already and is not empty" in capsys.readouterr().err
    assert not list(project.glob(".merged*"))


def test_chat_once_and_its_mistakes(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    capsys.readouterr()
    assert main(["chat", "--adapter", str(trained), "--prompt", "say a", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip() != ""
    assert main(["chat", "--prompt", "x"]) == 2
    assert "name the base model with --model" in capsys.readouterr().err
    assert main(["chat", "--adapter", str(tmp_path / "none"), "--prompt", "x"]) == 2
    assert "there is no adapter at" in capsys.readouterr().err
    (tmp_path / "lonely").mkdir()
    assert main(["chat", "--adapter", str(tmp_path / "lonely"), "--prompt", "x"]) == 2
    assert "so the base is unknown: name it with --model" in capsys.readouterr().err


def test_the_base_is_found_in_the_adapters_own_files(
    trained: Path, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "elsewhere" / "mine"
    shutil.copytree(trained, copied)
    (copied.parent / "config.json").write_text('{"model_type": "llama"}')  # a model's, not a run's
    assert base_settings(str(copied), None, None) == ModelSettings(name=str(model_folder))
    assert main(["chat", "--adapter", str(copied), "--prompt", "say a", "--max-new-tokens", "4"]) == 0
    assert main(["merge", str(copied / "adapter_model.safetensors"), "--output", "merged"]) == 0
    (copied / "veneer.json").unlink()
    assert base_settings(str(copied), None, None).name == str(model_folder)
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "./gone"}))
    capsys.readouterr()
    assert main(["chat", "--adapter", str(copied), "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert "'./gone': there is no such folder" in error
    assert "names this base; give another with --model" in error


def test_a_runs_folder_stands_for_its_adapter(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["info", str(trained)]) == 0
    direct = capsys.readouterr().out
    assert main(["info", "out"]) == 0
    out = capsys.readouterr()
    assert out.out.splitlines()[1:] == direct.splitlines()[1:]
    assert out.err == "out is the folder of a run; its adapter is out/adapter\n"
    assert main(["chat", "--adapter", "out", "--prompt", "say a", "--max-new-tokens", "2"]) == 0
    assert main(["merge", "out", "--output", "merged"]) == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"veneer {veneer.__version__}\n"


def test_an_adapter_of_another_model_is_refused_without_a_hint_for_python(
    trained: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(tokenizer, seed=1).save_pretrained("other")
    tokenizer.save_pretrained("other")
    with pytest.raises(VeneerError, match="strict=False"):
        main(["--debug", "chat", "--adapter", str(trained), "--model", "./other", "--prompt", "x"])
    assert main(["chat", "--adapter", str(trained), "--model", "./other", "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert "another base model" in error
    assert "strict" not in error


def test_chat_switches_between_base_and_adapter(trained: Path, model_folder: Path) -> None:
    def chat(adapter: str | None) -> Chat:
        options = argparse.Namespace(adapter=adapter, model=None, system=None, max_new_tokens=5,
                                     conversation_template=None)
        return Chat(ModelSettings(name=str(model_folder)), options)

    bare, both = chat(None).answer("say aaa"), chat(str(trained))
    adapted = both.answer("say aaa")
    assert both.command("/base") == "now answering: the bare model"
    assert both.command("/reset") == "forgotten"
    assert both.answer("say aaa") == bare != adapted
    both.command("/reset")
    assert both.command("/adapter") == "now answering: the adapter"
    assert both.answer("say aaa") == adapted
    assert both.command("/what").startswith("unknown command /what. /base: the bare model answers")


def test_chat_loop_reads_lines(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["/base", "", "say a", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", "--adapter", str(trained), "--max-new-tokens", "3"]) == 0
    out = capsys.readouterr()
    assert "now answering: the bare model" in out.err
    assert next(lines, None) is None
