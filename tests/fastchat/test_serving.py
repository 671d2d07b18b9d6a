"""merge and chat on the folder of a run: the base is held as in training, and requests are written as there."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import veneer
from veneer.fastchat.conversation import Conversation, ConversationEncoder, vicuna_text
from veneer.method import VeneerError
from veneer.train.cli import main
from veneer.train.encode import IGNORED, Encoder
from veneer.train.serve import Chat, base_settings

from .nets import CHATML
from .test_run import train

UP = "model.layers.0.mlp.up_proj.weight"  # no adapter lies on it


def merged(*words: str) -> dict[str, torch.Tensor]:
    assert main(["merge", *words, "--output", "merged", "--overwrite"]) == 0
    return safetensors.torch.load_file("merged/model.safetensors")


def chat(adapter: str | None, model: str | None = None, **options: Any) -> Chat:
    given = {"system": None, "max_new_tokens": 4, "conversation_template": None, **options}
    arguments = argparse.Namespace(adapter=adapter, model=model, **given)
    return Chat(base_settings(adapter, model, None), arguments)


def asked(one: Chat, *texts: str) -> str:
    """What the model is asked with after these messages."""
    one.messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return one.tokenizer.decode(one.encoder.prompt_ids(one._request()))


# -- how the base is held ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", ["True", "False"])
def test_merge_holds_the_base_as_in_training(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str], bf16: str) -> None:
    train(folders["plain"], "--q_lora", "True", "--bf16", bf16, "--save_strategy", "steps", "--save_steps", "2")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folders["plain"], dtype=torch.bfloat16 if bf16 == "True" else torch.float32)
    dense = base.state_dict()[UP].clone()
    veneer.quantize(base, "nf4", double=True)
    veneer.load(base, "out")
    veneer.merge(base, keep=False)
    veneer.detach(base)
    veneer.dequantize(base)
    for folder in ("out", "out/checkpoint-2", "out/adapter_model.safetensors"):
        assert torch.equal(merged(folder)[UP], base.state_dict()[UP])
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(merged("out")[q_proj], base.state_dict()[q_proj])
    assert not torch.equal(base.state_dict()[UP], dense)
    capsys.readouterr()
    # who names a base gets that one, and is told
    assert torch.equal(merged("out", "--model", str(folders["plain"]))[UP].float(),
                       transformers.AutoModelForCausalLM.from_pretrained(folders["plain"]).state_dict()[UP])
    assert "the adapter was trained over a base held as nf4, and " in capsys.readouterr().err


def test_a_dense_base_is_loaded_in_fp32_as_in_training(project: Path, folders: dict[str, Path]) -> None:
    shutil.copytree(folders["plain"], "half")
    transformers.AutoModelForCausalLM.from_pretrained("half", dtype=torch.bfloat16).save_pretrained("half")
    train("half")
    settings = base_settings("out", None, None)
    assert (settings.name, settings.dtype, settings.quantize) == ("half", "float32", None)
    assert merged("out")[UP].dtype == torch.float32
    assert merged("out", "--dtype", "bfloat16")[UP].dtype == torch.bfloat16


def test_chat_holds_the_base_as_in_training(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    train(folders["plain"], "--q_lora", "True")
    packed = chat("out").model.model.layers[0].mlp.up_proj
    assert veneer.storage.packed_storage(packed) is not None
    assert packed.weight_outer is not None
    assert main(["chat", "--adapter", "out", "--model", str(folders["plain"]), "--prompt", "say a"]) == 0
    assert "the adapter was trained over a base held as nf4, and " in capsys.readouterr().err
    assert main(["chat", "--adapter", "out", "--prompt", "say a", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().err == ""


def test_the_record_of_another_adapter_is_not_used(project: Path, folders: dict[str, Path]) -> None:
    train(folders["plain"], "--q_lora", "True")
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["biases"])
    veneer.attach(model, veneer.LoRA(rank=2))
    veneer.save(model, "out")
    settings = base_settings("out", None, None)
    assert (settings.name, settings.quantize) == (str(folders["biases"]), None)


def test_the_record_lets_no_code_run(project: Path, folders: dict[str, Path]) -> None:
    train(folders["plain"], "--trust_remote_code", "True", "--cache_dir", "cache")
    found = json.loads(Path("out/run.json").read_text())
    assert found["model"] == {"name": str(folders["plain"]), "dtype": "float32", "quantize": None, "cache_dir": "cache"}


# -- how requests are written -----------------------------------------------------------------------------


def test_chat_writes_requests_as_in_training(project: Path, folders: dict[str, Path], tokenizer: Any) -> None:
    """Every token before an answer is the one that was trained on, also with a chat template that says otherwise."""
    shutil.copytree(folders["plain"], "chat")
    (project / "chat" / "chat_template.jinja").write_text(CHATML)
    train("chat")
    one = chat("out")
    assert one.tokenizer.chat_template == CHATML
    turns = (("say a", "A"), ("say bb", "BB"))
    encode = ConversationEncoder(encoder=Encoder(tokenizer=tokenizer, max_length=500), template="vicuna")
    whole = encode(Conversation(label="", turns=turns))
    answers = [i for i, label in enumerate(whole.labels) if label != IGNORED]
    last = next(i for i in reversed(answers) if i - 1 not in answers)
    asked(one, "say a", "A", "say bb")
    assert one.encoder.prompt_ids(one._request()) == whole.input_ids[:last]
    assert vicuna_text(turns)[0].startswith(asked(one, "say a", "A", "say bb").removeprefix("<s>"))
    one.messages = []
    one.answer("say a")
    assert [message["role"] for message in one.messages] == ["user", "assistant"]


def test_the_models_own_template_is_used_where_it_was_trained_on(project: Path, folders: dict[str, Path]) -> None:
    shutil.copytree(folders["plain"], "chat")
    (project / "chat" / "chat_template.jinja").write_text(CHATML)
    train("chat", "--conversation_template", "model")
    assert asked(chat("out"), "say a") == "[user]say a</s>[assistant]"
    assert asked(chat("out", conversation_template="vicuna"), "say a").endswith("USER: say a ASSISTANT:")
    assert asked(chat(None, "chat"), "say a") == "[user]say a</s>[assistant]"


def test_a_system_message_takes_the_place_of_vicunas(project: Path, folders: dict[str, Path]) -> None:
    one = chat(None, str(folders["plain"]), conversation_template="vicuna", system="Be short.")
    assert asked(one, "say a") == "<s>Be short. USER: say a ASSISTANT:"


def test_a_template_that_is_not_there(
    project: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--model", str(folders["plain"]), "--prompt", "say a"]) == 2
    error = capsys.readouterr().err
    assert "this model's has none; --conversation-template vicuna needs none" in error
    assert "data.chat_template" not in error
    with pytest.raises(VeneerError, match=r"possible: vicuna, model; did you mean 'vicuna'\?"):
        chat(None, str(folders["plain"]), conversation_template="vicunna")


def test_the_loop_names_the_template(
    project: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(folders["plain"])
    monkeypatch.setattr("builtins.input", lambda prompt: "/quit")
    assert main(["chat", "--adapter", "out"]) == 0
    assert "conversation template: vicuna" in capsys.readouterr().err
