"""Fixtures: the tiny models as folders, and a project folder with conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .nets import conversations, make_model, make_tokenizer, write


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def folders(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Llama as a Hugging Face folder, without and with biases."""
    found = {}
    for name, bias in (("plain", False), ("biases", True)):
        found[name] = tmp_path_factory.mktemp(name)
        make_model(tokenizer, bias).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data.json and eval.json; the current directory."""
    write(tmp_path / "data.json", conversations(8))
    write(tmp_path / "eval.json", conversations(3))
    monkeypatch.chdir(tmp_path)
    return tmp_path
