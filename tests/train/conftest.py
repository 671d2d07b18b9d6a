"""Fixtures: a tiny tokenizer and model, and a project folder for a run of seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from tiny import CHATML, chat_rows, tiny_model, write_jsonl
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token for each character of ASCII, plus three special ones; ChatML."""
    characters = [chr(c) for c in range(32, 127)] + ["\n", "é"]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters, "<unk>"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|pad|>", unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    made.chat_template = CHATML
    return made


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return tiny_model(tokenizer)


@pytest.fixture(scope="session")
def model_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data and a config.yaml for a run of seconds; the current directory."""
    write_jsonl(tmp_path / "train.jsonl", chat_rows(24))
    write_jsonl(tmp_path / "heldout.jsonl", chat_rows(6, offset=100))
    config = {
        "model": str(model_folder),
        "adapter": {"method": "lora", "rank": 4},
        "data": {"train": "train.jsonl", "heldout": "heldout.jsonl"},
        "training": {"batch_size": 4, "learning_rate": 0.01, "log_every": 1},
        "evaluation": {"max_new_tokens": 6},
        "output": {"directory": "out"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path
