"""convert_file: every pair of formats there and back, and that nothing is overwritten or half written."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re

import pytest
import torch
from convert_helpers import (
    BOTH,
    LINEAR,
    Bare,
    assert_equal,
    at,
    content,
    refused,
    saved,
    stripped,
    there_and_back,
)
from io_models import Mixed, fresh, outputs, relative
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from veneer import AdaLoRA, Full, LoHa, LoRA, Rows, VeRA, convert_file
from veneer.formats.content import FORMATS
from veneer.formats.read import detect
from veneer.method import VeneerError
from veneer.train.cli import main


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(FORMATS, 2)))
def test_lora_there_and_back(tmp_path, one, other):
    source, _ = saved(tmp_path, LINEAR)
    before, after = there_and_back(tmp_path, source, one, other)
    assert_equal(before, after)
    assert_equal(content(source), after)
    assert after.seed == before.seed is not None


@pytest.mark.parametrize("form", FORMATS)
def test_what_comes_back_computes_the_same_on_the_model(tmp_path, form):
    source, model = saved(tmp_path, LINEAR)
    convert_file(source, at(tmp_path, form, "other"), form)
    convert_file(at(tmp_path, form, "other"), tmp_path / "back", "peft")
    again = fresh("mixed")
    report = veneer.load(again, tmp_path / "back")
    assert report.problems == ()
    assert torch.equal(outputs(again, "mixed"), outputs(model, "mixed"))
    with pytest.raises(VeneerError, match="another base model"):  # the fingerprint travels too
        veneer.load(Mixed(), tmp_path / "back")


CELLS = [(case, other) for case, (_, others) in BOTH.items() for other in others.split()]


@pytest.mark.parametrize(("case", "other"), CELLS)
def test_other_methods_there_and_back(tmp_path, case, other):
    """From the native format, which holds everything, and back to it."""
    source, _ = saved(tmp_path, BOTH[case][0])
    before, after = there_and_back(tmp_path, source, "native", other)
    assert_equal(before, after)


@pytest.mark.parametrize(("case", "other"), [(case, other) for case, other in CELLS if "peft" in BOTH[case][1]])
def test_other_methods_from_pefts_files_and_back(tmp_path, case, other):
    source, model = saved(tmp_path, BOTH[case][0])
    assert detect(source) == "peft"
    other = "native" if other == "peft" else other
    convert_file(source, at(tmp_path, other, "b"), other)
    convert_file(at(tmp_path, other, "b"), tmp_path / "c", "peft")
    assert_equal(content(source), content(tmp_path / "c"))
    first, last = (load_file(path / "adapter_model.safetensors") for path in (source, tmp_path / "c"))
    assert set(first) == set(last)
    assert all(torch.equal(first[key], last[key]) for key in first)
    again = fresh("mixed")
    assert veneer.load(again, tmp_path / "c").problems == ()
    assert torch.equal(outputs(again, "mixed"), outputs(model, "mixed"))


KINDS = [
    ("gpt2", {"*c_attn": LoRA(rank=2), "*c_proj": Full()}),
    ("gpt2", {"*c_attn": VeRA(rank=2), "*mlp.c_fc": VeRA(rank=2)}),
    ("llama_tied", {"*embed_tokens": LoRA(rank=2), "*q_proj": LoRA(rank=2)}),
    ("llama_tied", {"*embed_tokens": Full(), "*q_proj": LoRA(rank=2)}),
    ("llama_tied", {"*embed_tokens": Rows([2, 3]), "*q_proj": AdaLoRA(init_r=3, target_r=2, total_step=9)}),
]


@pytest.mark.parametrize(("kind", "rules"), KINDS)
def test_transposed_and_tied_weights(tmp_path, kind, rules):
    """What is not to be seen in the tensors: Conv1D stores its weight turned, a head shares its embedding's."""
    source, model = saved(tmp_path, rules, fresh(kind))
    convert_file(source, tmp_path / "n", "native")
    convert_file(tmp_path / "n", tmp_path / "p", "peft")
    assert_equal(content(source), content(tmp_path / "p"))
    first, last = (load_file(path / "adapter_model.safetensors") for path in (source, tmp_path / "p"))
    assert set(first) == set(last)
    assert all(torch.equal(first[key], last[key]) for key in first)
    said = [json.loads((path / "adapter_config.json").read_text()) for path in (source, tmp_path / "p")]
    for key in ("task_type", "fan_in_fan_out", "ensure_weight_tying", "r", "peft_type"):
        assert said[0].get(key) == said[1].get(key)
    again = fresh(kind)
    assert veneer.load(again, tmp_path / "p").problems == ()
    assert torch.equal(outputs(again, kind), outputs(model, kind))


def test_experts(tmp_path):
    model = nn.ModuleDict({"router": nn.Linear(6, 3), "experts": nn.Module()})
    model["experts"].up = nn.Parameter(torch.randn(3, 4, 6))
    source, _ = saved(tmp_path, {"router": LoRA(rank=2), "*.up": LoRA(rank=1, alpha=2)}, model)
    for form in ("native", "nemo", "modelopt"):
        convert_file(source, tmp_path / form, form)
        convert_file(tmp_path / form, tmp_path / f"p-{form}", "peft")
        assert_equal(content(source), content(tmp_path / f"p-{form}"))
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file(load_file(source / "adapter_model.safetensors"), bare / "adapter_model.safetensors")
    (bare / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    refused(bare, tmp_path / "x", "native", "target_parameters is on is not to be seen in it.*base=, --base")
    convert_file(bare, tmp_path / "x", "native", model)
    assert {r.name: r.tensors["A"].shape for r in content(tmp_path / "x").records} == {"router": (2, 6),
                                                                                       "experts.up": (3, 1, 6)}


def test_starts_become_plain_lora_where_the_format_has_none(tmp_path):
    """The starting pair is a part of the change: other formats get it within a pair of twice the rank."""
    rules = {"block.0": LoRA(rank=2, init="pissa"), "head": LoHa(rank=2)}
    source, model = saved(tmp_path, rules)
    assert detect(source) == "native"  # PEFT's files have one method
    report = convert_file(source, tmp_path / "l.safetensors", "lycoris")
    assert any("the start of 'block.0' (and 0 more) is not kept" in note for note in report.notes)
    convert_file(tmp_path / "l.safetensors", tmp_path / "n", "native")
    assert {record.name: record.method.rank for record in content(tmp_path / "n").records} == {"block.0": 4, "head": 2}
    again = fresh("mixed")
    veneer.load(again, tmp_path / "n")
    assert relative(outputs(again, "mixed"), outputs(model, "mixed")) < 1e-6


def test_starts_are_kept_where_an_adapter_stays_native(tmp_path):
    source, _ = saved(tmp_path, {"block.*": LoRA(rank=2, init="pissa"), "attention.in_proj_weight": LoRA(rank=2)})
    assert detect(source) == "native"
    convert_file(source, tmp_path / "m", "modelopt")
    assert_equal(content(source), content(tmp_path / "m"))




def test_nothing_is_overwritten_in_silence(tmp_path):
    source, _ = saved(tmp_path, LINEAR)
    for form in FORMATS:
        target = at(tmp_path, form, f"t-{form}")
        convert_file(source, target, form)
        before = {path: path.read_bytes() for path in [target, *target.rglob("*")] if path.is_file()}
        with pytest.raises(VeneerError, match=r"is there already; overwrite=True \(--overwrite\) replaces it"):
            convert_file(source, target, form)
        assert before == {path: path.read_bytes() for path in before}
        convert_file(source, target, form, overwrite=True)
        assert_equal(content(source), content(target))
    (tmp_path / "t-nemo" / "notes.txt").write_text("mine")
    convert_file(source, tmp_path / "t-nemo", "peft", overwrite=True)
    assert detect(tmp_path / "t-nemo") == "peft"
    assert (tmp_path / "t-nemo" / "notes.txt").read_text() == "mine"
    with pytest.raises(VeneerError, match="a directory of ModelOpt's adapters"):
        convert_file(source, tmp_path / "t-modelopt", "peft", overwrite=True)
    with pytest.raises(VeneerError, match="is where the source is"):
        convert_file(source, source, "native", overwrite=True)


@pytest.mark.parametrize("form", FORMATS)
def test_a_disk_without_room_leaves_nothing(tmp_path, form, monkeypatch):
    source, _ = saved(tmp_path, LINEAR)
    (tmp_path / "out").mkdir()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VeneerError, match="No space left"):
        convert_file(source, at(tmp_path / "out", form, "x"), form)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_bad_arguments(tmp_path):
    source, _ = saved(tmp_path, {"block.0": LoRA(rank=2)})
    for arguments, says in [
            (("x", "pef"), "unknown format to='pef'; did you mean 'peft'.*Known: native, peft"),
            (("x", "kohya"), "kohya is one file: give a target that ends in .safetensors"),
            (("x.safetensors", "peft"), "peft is a directory .*is a file's name")]:
        refused(source, tmp_path / arguments[0], arguments[1], says)
    refused(source, tmp_path / "x", "native", "unknown format from_='natve'; did you mean 'native'", from_="natve")
    refused(source, tmp_path / "x", "native", "is in the format peft, not kohya", from_="kohya")
    refused(source, tmp_path / "x", "modelopt", "to be that of a directory", name="a/b")
    refused(tmp_path / "nowhere", tmp_path / "x", "native", "there is nothing at")
    refused(source, tmp_path / "x", "native", "there is no folder", base=tmp_path / "nowhere")


def test_load_and_info_name_the_command(tmp_path):
    source, _ = saved(tmp_path, {"block.0": LoRA(rank=2)})
    convert_file(source, tmp_path / "k.safetensors", "kohya")
    for ask in (veneer.info, lambda path: veneer.load(fresh("mixed"), path)):
        with pytest.raises(VeneerError, match=r"is in kohya's format.*veneer convert .* --to peft"):
            ask(tmp_path / "k.safetensors")


def test_the_command(tmp_path, capsys):
    source, _ = saved(tmp_path, {"to_q": LoRA(rank=2, alpha=3, dropout=0.5)}, Bare())
    file = tmp_path / "k.safetensors"
    assert main(["convert", str(source), str(file), "--to", "kohya", "--prefix", "lora_te"]) == 0
    said = capsys.readouterr().out
    assert "converted 1 weights, 40 numbers" in said
    assert "(peft)" in said
    assert "note: dropout is in the file's header alone" in said
    assert main(["convert", str(source), str(file), "--to", "kohya"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["convert", str(source), str(file), "--to", "kohya", "--overwrite"]) == 0
    save_file(Bare().state_dict(), tmp_path / "base.safetensors")
    foreign = stripped(file, tmp_path / "f.safetensors")
    again = ["convert", str(foreign), str(tmp_path / "m"), "--to", "modelopt", "--from", "lycoris", "--name", "mine"]
    assert main(again) == 2
    assert "--base" in capsys.readouterr().err
    assert main([*again, "--base", str(tmp_path / "base.safetensors")]) == 0
    assert re.search(r"\(lycoris\) to .*m \(modelopt: modelopt_state.json, mine/", capsys.readouterr().out)
