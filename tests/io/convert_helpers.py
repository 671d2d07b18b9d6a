"""Adapters for the tests of convert_file, and how their files are compared."""

from __future__ import annotations

import pytest
import torch
from io_models import adapted, fresh
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from veneer import AdaLoRA, DoRA, Full, LoHa, LoKr, LoRA, RandLoRA, Rows, VBLoRA, VeRA, convert_file
from veneer.formats.base import known
from veneer.formats.read import detect, read
from veneer.method import VeneerError

FILES = ("kohya", "lycoris")
LINEAR = {"block.*": LoRA(rank=2, alpha=3, dropout=0.25), "head": LoRA(rank=2, alpha=3, dropout=0.25)}


class Bare(nn.Module):
    """Linear layers and convolutions, with names that have underscores of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 12)
        self.down_blocks = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 16)])
        self.conv_in = nn.Conv2d(8, 6, 3)
        self.conv_1d = nn.Conv1d(8, 6, 3)


def at(tmp_path, form, name):
    return tmp_path / (f"{name}.safetensors" if form in FILES else name)


def saved(tmp_path, rules, model=None, **options):
    """An adapter as `save` writes it, and the model that it is on."""
    model = adapted(fresh("mixed") if model is None else model, rules, **options)
    veneer.save(model, tmp_path / "saved")
    return tmp_path / "saved", model


def content(path):
    return read(path, detect(path), known(None), None)


def assert_equal(one, other):
    """An equal plan, and every tensor bit for bit."""
    plans = [{record.name: record.method for record in found.records} for found in (one, other)]
    assert plans[0] == plans[1]
    assert_same_tensors(one, other)


def assert_same_tensors(one, other):
    a, b = ({record.name: record for record in found.records} for found in (one, other))
    assert set(a) == set(b)
    for name, record in a.items():
        assert set(record.tensors) == set(b[name].tensors)
        for part, tensor in record.tensors.items():
            assert tensor.dtype == b[name].tensors[part].dtype
            assert torch.equal(tensor, b[name].tensors[part]), (name, part)


def there_and_back(tmp_path, source, one, other):
    """source → one → other → one: the contents of the two files in the format `one`."""
    first, between, last = (at(tmp_path, form, name) for form, name in ((one, "a"), (other, "b"), (one, "c")))
    convert_file(source, first, one)
    report = convert_file(first, between, other)
    assert (report.source_format, report.format, detect(between)) == (one, other, other)
    convert_file(between, last, one)
    return content(first), content(last)


def refused(source, target, to, says, **options):
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(VeneerError, match=says):
        convert_file(source, target, to, **options)
    assert sorted(target.parent.rglob("*")) == before


def as_others_would(path, to):
    """PEFT's two files without anything of Veneer's."""
    to.mkdir()
    save_file(load_file(path / "adapter_model.safetensors"), to / "adapter_model.safetensors")
    (to / "adapter_config.json").write_text((path / "adapter_config.json").read_text())
    return to


def stripped(path, to):
    """A file of kohya's or LyCORIS's without Veneer's header."""
    save_file(load_file(path), to)
    return to


BOTH = {
    "patterns": ({"block.0": LoRA(rank=2, alpha=5), "head": LoRA(rank=3)}, "peft modelopt kohya lycoris"),
    "rslora": ({"*.0": LoRA(rank=3, rank_stabilized=True)}, "peft modelopt kohya lycoris"),
    "convs": ({"conv*": LoRA(rank=2, alpha=7)}, "peft modelopt kohya lycoris"),
    "bf16": ({"block.*": LoRA(rank=2, dtype="bfloat16")}, "peft nemo modelopt kohya lycoris"),
    "alpha_no_float32": ({"block.*": LoRA(rank=2, alpha=0.1)}, "peft nemo modelopt kohya lycoris"),
    "dora": ({"block.*": DoRA(LoRA(rank=2, alpha=3))}, "peft nemo lycoris"),
    "dora_conv": ({"conv*": DoRA(LoRA(rank=2))}, "peft lycoris"),
    "embedding": ({"embed": LoRA(rank=2)}, "peft modelopt"),
    "dora_embedding": ({"embed": DoRA(LoRA(rank=2))}, "peft"),
    "lora_bias": ({"block.*": LoRA(rank=2, alpha=3, bias=True)}, "peft"),
    "full": ({"block.*": LoRA(rank=2), "head": Full(), "conv1": Full()}, "peft"),
    "all_biases": ({"block.*": LoRA(rank=2), "*.bias": Full()}, "peft"),
    "own_biases": ({"block.*": LoRA(rank=2), "block.*.bias": Full()}, "peft"),
    "rows": ({"block.*": LoRA(rank=2), "embed": Rows([3, 1, 7])}, "peft"),
    "loha": ({"block.*": LoHa(rank=2, alpha=3)}, "peft lycoris"),
    "loha_convs": ({"conv*": LoHa(rank=2, alpha=3)}, "peft lycoris"),
    "loha_effective": ({"conv*": LoHa(rank=2, alpha=3, effective_conv=True)}, "peft lycoris"),
    "loha_dora": ({"block.*": DoRA(LoHa(rank=2, alpha=3))}, "lycoris"),
    "lokr": ({"block.*": LoKr(rank=1, alpha=3, decompose_factor=2)}, "peft lycoris"),
    "lokr_whole": ({"block.*": LoKr(rank=8, alpha=4)}, "peft lycoris"),
    "lokr_whole_odd_scale": ({"block.*": LoKr(rank=8, alpha=5.3)}, "peft lycoris"),
    "lokr_both": ({"block.*": LoKr(rank=1, alpha=2, decompose_both=True, decompose_factor=4)}, "peft lycoris"),
    "lokr_conv2d": ({"conv2": LoKr(rank=8, alpha=4)}, "peft lycoris"),
    "lokr_effective": ({"conv1": LoKr(rank=2, decompose_factor=1, effective_conv=True)}, "peft lycoris"),
    "lokr_dora": ({"block.*": DoRA(LoKr(rank=1, alpha=3, decompose_factor=2))}, "lycoris"),
    "adalora": ({"block.*": AdaLoRA(init_r=4, target_r=2, total_step=9)}, "peft"),
    "vera": ({"block.*": VeRA(rank=4, save_bases=False)}, "peft"),
    "vera_saved": ({"block.*": VeRA(rank=4, save_bases=True)}, "peft"),
    "vblora": ({"block.*": VBLoRA(rank=2, num_vectors=6, vector_length=8)}, "peft"),
    "randlora": ({"block.*": RandLoRA(rank=3, alpha=4)}, "peft"),
    "attention": ({"attention.*_weight": LoRA(rank=2), "attention.out_proj": LoRA(rank=2)}, "modelopt"),
}
