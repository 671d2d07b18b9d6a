"""Flags and their defaults, and what a command cannot mean."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from veneer.fastchat import (
    Arguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    TrainingArguments,
    VeneerArguments,
    parse_arguments,
)
from veneer.method import VeneerError
from veneer.train.cli import main

from .nets import golden

META = golden("meta")
DATA = ["--data_path", "data.json"]


def parse(*words: str) -> Arguments:
    return parse_arguments([*DATA, *words])


def defaults(cls: Any) -> dict[str, Any]:
    fresh = cls()
    return {field.name: getattr(fresh, field.name) for field in dataclasses.fields(cls)}


@pytest.mark.parametrize(("cls", "key"), [
    (ModelArguments, "ModelArguments"), (DataArguments, "DataArguments"), (LoraArguments, "LoraArguments"),
])  # fmt: skip
def test_fields_and_defaults_are_the_originals(cls: Any, key: str) -> None:
    assert defaults(cls) == {name: default for name, (_, default) in META[key].items()}


def test_training_arguments_extend_transformers() -> None:
    assert issubclass(TrainingArguments, transformers.TrainingArguments)
    own = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    theirs = {field.name: field.default for field in dataclasses.fields(transformers.TrainingArguments)}
    found = {name: field.default for name, field in own.items() if field.default != theirs.get(name, "absent")}
    assert found == {name: default for name, (_, default) in META["TrainingArguments_overrides"].items()}


def test_the_command_of_the_original() -> None:
    found = parse(
        "--model_name_or_path", "some/model", "--lora_r", "4", "--lora_alpha", "32", "--lora_dropout", "0.1",
        "--lora_target_modules", "q_proj", "k_proj", "v_proj", "--lora_bias", "all", "--q_lora", "True", "--bf16",
        "True", "--output_dir", "out", "--model_max_length", "2048", "--gradient_checkpointing", "True",
        "--lazy_preprocess", "True", "--eval_data_path", "eval.json", "--flash_attn", "True", "--learning-rate", "2e-5",
        "--padding_side", "left", "--trust_remote_code", "True", "--cache_dir", "cache", "--lora_weight_path",
        "adapter", "--conversation_template", "model", "--malformed", "skip",
    )  # fmt: skip
    assert found.model == ModelArguments(model_name_or_path="some/model", trust_remote_code=True, padding_side="left")
    assert found.data == DataArguments(data_path="data.json", eval_data_path="eval.json", lazy_preprocess=True)
    assert found.lora == LoraArguments(
        lora_r=4, lora_alpha=32, lora_dropout=0.1, lora_target_modules=["q_proj", "k_proj", "v_proj"],
        lora_bias="all", q_lora=True, lora_weight_path="adapter",
    )  # fmt: skip
    training = found.training
    assert (training.bf16, training.output_dir, training.model_max_length, training.flash_attn) == (
        True, "out", 2048, True)  # fmt: skip
    assert (training.activation_checkpointing, training.cache_dir, training.learning_rate) == (True, "cache", 2e-5)
    assert (found.own.conversation_template, found.own.malformed) == ("model", "skip")
    assert {"lora_r", "lora_bias", "learning_rate"} <= found.given
    assert not {"optim", "lora_weight"} & found.given


def test_flags_of_older_scripts_have_their_names_of_today() -> None:
    found = parse(
        "--evaluation_strategy", "steps", "--warmup_ratio", "0.03", "--per_gpu_train_batch_size", "3",
        "--group_by_length", "True", "--overwrite_output_dir", "True", "--fsdp_transformer_layer_cls_to_wrap",
        "LlamaDecoderLayer", "--gradient_checkpointing", "False", "--logging_dir=logs",
    )  # fmt: skip
    training = found.training
    assert (str(training.eval_strategy.value), training.warmup_steps, training.per_device_train_batch_size) == (
        "steps", 0.03, 3)  # fmt: skip
    assert training.train_sampling_strategy == "group_by_length"
    assert training.fsdp_config == {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
    assert training.activation_checkpointing is False
    assert len(found.notes) == 4
    assert found.notes[0].startswith("--overwrite_output_dir has no effect: nothing asks for it")
    assert found.notes[0].endswith("unless --resume_from_checkpoint False starts anew")
    assert found.notes[1].startswith("--logging_dir has no effect: the environment variable TENSORBOARD_LOGGING_DIR")


def test_defaults_that_nobody_would_guess_are_said() -> None:
    model, output = parse("--bf16", "False").notes
    assert model == "--model_name_or_path is not given: facebook/opt-125m, FastChat's default, is taken"
    assert output == "--output_dir is not given: everything is written to 'trainer_output', transformers' default"
    assert parse("--model_name_or_path", "m", "--output_dir", "out").notes == ()


def test_a_number_of_warmup_steps_has_precedence_over_a_share() -> None:
    assert parse("--warmup_ratio", "0.03", "--warmup_steps", "7").training.warmup_steps == 7
    assert parse("--warmup_steps", "0", "--warmup_ratio", "0.03").training.warmup_steps == 0.03


def test_wrapping_joins_a_written_fsdp_config() -> None:
    both = parse("--fsdp_config", '{"version": 2}', "--fsdp_transformer_layer_cls_to_wrap", "Block")
    assert both.training.fsdp_config == {"version": 2, "transformer_layer_cls_to_wrap": "Block"}
    with pytest.raises(VeneerError, match=r"--fsdp_config is the file 'a.json'; write transformer_layer_cls_to_wrap "):
        parse("--fsdp_config", "a.json", "--fsdp_transformer_layer_cls_to_wrap", "Block")


def test_fsdp_and_deepspeed_reach_transformers() -> None:
    training = parse("--fsdp", "full_shard auto_wrap").training
    assert training.fsdp
    assert training.fsdp_plugin_args["reshard_after_forward"] is True
    with pytest.raises(VeneerError, match=r"(?i)deepspeed|no_such_config"):  # missing, or the file is
        parse("--deepspeed", "no_such_config.json")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_deepspeed_that_is_not_installed(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    missing = "--deepspeed needs the library deepspeed, .*: pip install deepspeed"
    for stage, message in ((2, missing), (3, "use stage 2")):
        text = json.dumps({"zero_optimization": {"stage": stage}})
        file.write_text(text)
        for value in (str(file), text):
            with pytest.raises(VeneerError, match=message):
                parse("--deepspeed", value)


@pytest.mark.parametrize(("words", "message"), [
    (["--lora_rr", "4"], "unknown flag --lora_rr; did you mean '--lora_r'?"),
    (["--lora_rank", "4"], "unknown flag --lora_rank; did you mean '--lora_r'?"),
    (["--local_rnk", "4"], "unknown flag --local_rnk; did you mean '--local_rank'?"),
    (["--lr", "1", "--lora_alpa", "4"],
     "unknown flag --lr; did you mean '--learning_rate'? unknown flag --lora_alpa; did you mean '--lora_alpha'?"),
    (["--lora_bias", "lora"], "--lora_bias is 'lora'; possible: none, all, lora_only"),
    (["--lora_r", "x"], "argument --lora_r/--lora-r: invalid int value: 'x'"),
    (["--lora_r", "0"], "--lora_r must be at least 1, got 0"),
    (["--lora_dropout", "1.0"], "--lora_dropout must be at least 0 and below 1, got 1.0"),
    (["--padding_side", "middle"], "--padding_side is 'middle'; possible: right, left"),
    (["--model_max_length", "0"], "--model_max_length must be at least 1, got 0"),
    (["--malformed", "ignore"], "--malformed is 'ignore'; possible: error, skip"),
    (["--conversation_template", "vicunna"], "possible: vicuna, model; did you mean 'vicuna'?"),
    (["--bf16", "True", "--fp16", "True"], "At most one of fp16 and bf16 can be True, but not both"),
    (["--bf16", "True", "stray"], "'stray' is the value of no flag"),
    (["--warmup_ratio", "2"], "--warmup_ratio must be a number from 0 to 1, got '2'"),
    (["--warmup_ratio", "1"], "--warmup_ratio 1 would warm up to the very end"),
    (["--set", "training.seed=1"], "--set belongs to a run from a YAML file, and --data_path is a flag of FastChat's"),
    (["--dry_run"], "--dry_run belongs to a run from a YAML file, and --data_path is a flag of FastChat's"),
])  # fmt: skip
def test_what_a_command_cannot_mean(words: list[str], message: str) -> None:
    with pytest.raises(VeneerError) as caught:
        parse(*words)
    assert message in str(caught.value)


def test_the_cli_tells_the_two_kinds_of_run_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "my.yaml", "--bf16", "True"]) == 2
    assert "the file 'my.yaml' belongs to a run from a YAML file, and --bf16 is a flag" in capsys.readouterr().err
    for behind in (["--bf16", "True", "my.yaml"], ["--bf16", "my.yaml"], ["--lora_r", "4", "my.yaml", "--bf16", "True"],
                   ["--lora_target_modules", "q_proj", "my.yaml"]):  # fmt: skip
        assert main(["train", *behind]) == 2
        assert (f"the file 'my.yaml' belongs to a run from a YAML file, and {behind[0]} is a flag of"
                in capsys.readouterr().err)
    assert main(["train", "my.yaml", "--dryrun"]) == 2
    assert "unknown flag --dryrun; did you mean '--dry-run'?" in capsys.readouterr().err
    assert main(["train", "my.yaml", "--dry-run"]) == 2  # a run from a YAML file
    assert "no config file 'my.yaml'" in capsys.readouterr().err
    assert main(["train", "--model_name_or_path", "x"]) == 2
    assert "--data_path is missing" in capsys.readouterr().err
    with pytest.raises(VeneerError, match="--data_path is missing"):
        main(["--debug", "train", "--model_name_or_path", "x"])


def test_help_lists_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--model_name_or_path", "x", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("lora_r", "data_path", "flash_attn", "deepspeed", "malformed"))


def test_the_help_of_yaml_runs_loads_no_library() -> None:
    code = ("import sys\nsys.modules['transformers'] = None\nfrom veneer.train.cli import main\n"
            "try:\n    main(['train', '--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
            "assert main(['train', '--lora_r', '4']) == 2\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert "--lora_r" in done.stdout
    assert "veneer train needs the library 'transformers', which is not installed" in done.stderr


def test_the_example_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "coming-from-fastchat.md").read_text(encoding="utf-8")
    words = shlex.split(re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1].replace("\\\n", " "))
    assert words[:2] == ["veneer", "train"]
    found = parse_arguments(words[2:])
    assert (found.lora.q_lora, found.training.warmup_steps, found.notes) == (True, 0.03, ())
    known = {field.name for cls in (ModelArguments, DataArguments, LoraArguments, VeneerArguments)
             for field in dataclasses.fields(cls)}  # fmt: skip
    assert all(f"`--{name}" in page for name in known - {"padding_side", "trust_remote_code", "lora_r", "lora_alpha"})
