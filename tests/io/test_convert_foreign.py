"""convert_file of files that other tools wrote, and of files that are not whole."""

from __future__ import annotations

import json

import pytest
import torch
from convert_helpers import (
    BOTH,
    Bare,
    as_others_would,
    assert_same_tensors,
    at,
    content,
    refused,
    saved,
    stripped,
)
from io_models import fresh, outputs, relative
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from veneer import DoRA, Full, LoHa, LoKr, LoRA, convert_file
from veneer.formats.read import detect
from veneer.train.cli import main

FOREIGN = ["patterns", "rslora", "convs", "bf16", "dora", "dora_conv", "embedding", "lora_bias", "loha",
           "loha_effective", "lokr", "lokr_whole", "lokr_both", "adalora", "rows"]


@pytest.mark.parametrize("case", FOREIGN)
def test_pefts_own_files_need_no_base(tmp_path, case):
    rules = {pattern: rule for pattern, rule in BOTH[case][0].items() if case != "loha_effective" or pattern != "conv*"}
    rules = rules or {"conv2": LoHa(rank=2, alpha=3, effective_conv=True)}
    source, model = saved(tmp_path, rules)
    foreign = as_others_would(source, tmp_path / "foreign")
    report = convert_file(foreign, tmp_path / "native", "native")
    assert any("has groups or a dilation" in note for note in report.notes) == ("conv" in str(list(rules)))
    convert_file(tmp_path / "native", tmp_path / "again", "peft")
    for path in ("native", "again"):
        other = fresh("mixed")
        assert veneer.load(other, tmp_path / path).problems == ()
        assert torch.equal(outputs(other, "mixed"), outputs(model, "mixed"))
    first, last = (load_file(path / "adapter_model.safetensors") for path in (foreign, tmp_path / "again"))
    assert set(first) == set(last)
    assert all(torch.equal(first[key], last[key]) for key in first)


def test_names_are_written_whole_where_the_base_is_not_known(tmp_path):
    """Short names could mean layers that the file is not about."""
    source, _ = saved(tmp_path, {"block.0": LoRA(rank=2)})
    foreign = as_others_would(source, tmp_path / "foreign")
    for options in ({}, {"base": fresh("mixed")}):
        convert_file(foreign, tmp_path / "n", "native", overwrite=True)
        convert_file(tmp_path / "n", tmp_path / "p", "peft", overwrite=True, **options)
        config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
        assert config["target_modules"] == (["0"] if options else ["block.0"])


def test_what_peft_says_of_the_base_travels(tmp_path):
    source, _ = saved(tmp_path, {"block.0": LoRA(rank=2)})
    foreign = as_others_would(source, tmp_path / "foreign")
    config = json.loads((foreign / "adapter_config.json").read_text())
    said = {"base_model_name_or_path": "some/model", "task_type": "SEQ_CLS"}
    (foreign / "adapter_config.json").write_text(json.dumps({**config, **said}))
    convert_file(foreign, tmp_path / "p", "peft")
    written = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert {key: written[key] for key in said} == said
    convert_file(foreign, tmp_path / "n", "native")
    assert "some/model" in str(veneer.info(tmp_path / "n"))


@pytest.mark.parametrize(("case", "says"), [
    ("vera", "tensors of VERA do not show the sizes"),
    ("vblora", "tensors of VBLORA do not show the sizes"),
    ("randlora", "tensors of RANDLORA do not show the sizes"),
    ("lokr_effective", "may be that of a Conv1d or of a Conv2d"),
    ("full", "may be of a Conv1d or of stacked experts"),
])
def test_what_pefts_files_do_not_show_is_asked_for(tmp_path, case, says):
    source, model = saved(tmp_path, BOTH[case][0])
    foreign = as_others_would(source, tmp_path / "foreign")
    refused(foreign, tmp_path / "n", "native", f"{says}.*base=, --base")
    convert_file(foreign, tmp_path / "n", "native", base=fresh("mixed"))
    again = fresh("mixed")
    assert veneer.load(again, tmp_path / "n").problems == ()
    assert torch.equal(outputs(again, "mixed"), outputs(model, "mixed"))


@pytest.mark.parametrize(("rules", "form"), [
    ({"to_q": LoRA(rank=2, alpha=3), "down_blocks.*": LoRA(rank=3, alpha=0.5), "conv*": LoRA(rank=2)}, "kohya"),
    ({"*": DoRA(LoRA(rank=2, alpha=4))}, "lycoris"),
    ({"*": LoHa(rank=2, alpha=3)}, "lycoris"),
    ({"conv*": LoHa(rank=2, alpha=3, effective_conv=True)}, "lycoris"),
    ({"*": LoKr(rank=1, alpha=3, decompose_factor=2)}, "lycoris"),
    ({"to_q": LoKr(rank=1, alpha=3, decompose_both=True, decompose_factor=4)}, "lycoris"),
    ({"*": LoKr(rank=99)}, "lycoris"),
    ({"conv_in": LoKr(rank=1, alpha=3, decompose_factor=1, effective_conv=True)}, "lycoris"),
    ({"down_blocks.*": DoRA(LoKr(rank=1, alpha=3, decompose_factor=2))}, "lycoris"),
])
def test_files_of_kohya_and_lycoris_alone(tmp_path, rules, form):
    """Without a header of Veneer's, the base tells the names: as a model, a folder, or a file."""
    base = Bare()
    source, model = saved(tmp_path, rules, Bare())
    convert_file(source, tmp_path / "f.safetensors", form)
    foreign = stripped(tmp_path / "f.safetensors", tmp_path / "g.safetensors")
    assert detect(foreign) == form
    refused(foreign, tmp_path / "n", "native", "dots and underscores are the same.*base=, --base")
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    given = base, tmp_path / "base", tmp_path / "base" / "model.safetensors"
    for i, each in enumerate(given):
        convert_file(foreign, tmp_path / f"n{i}", "native", base=each)
        again = Bare()
        report = veneer.load(again, tmp_path / f"n{i}")
        assert report.problems == ()
        ours = {name: a.state_dict() for name, a in veneer.adapters(model)["default"].weights.items()}
        for name, adapter in veneer.adapters(again)["default"].weights.items():
            assert {part: tensor.tolist() for part, tensor in adapter.state_dict().items()} == \
                {part: tensor.tolist() for part, tensor in ours[name].items()}
            mine, theirs = adapter.method, veneer.adapters(model)["default"].weights[name].method
            inner = (getattr(mine, "inner", mine), getattr(theirs, "inner", theirs))
            assert type(inner[0]) is type(inner[1])
            assert inner[0].scale == inner[1].scale
        convert_file(tmp_path / f"n{i}", tmp_path / f"h{i}.safetensors", form)
        first, last = load_file(foreign), load_file(tmp_path / f"h{i}.safetensors")
        assert set(first) == set(last)
        assert all(torch.equal(first[key], last[key]) for key in first if not key.endswith("alpha"))


def test_a_layer_with_a_layer_inside(tmp_path):
    """Its weight goes by its whole name."""
    model = nn.ModuleDict({"outer": nn.Linear(4, 4)})
    model["outer"].add_module("inner", nn.Linear(4, 4))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    source, _ = saved(tmp_path, {"outer.weight": LoRA(rank=1)}, model)
    convert_file(as_others_would(source, tmp_path / "f"), tmp_path / "n", "native", tmp_path / "base.safetensors")
    assert_same_tensors(content(source), content(tmp_path / "n"))
    assert [record.name for record in content(tmp_path / "n").records] == ["outer.weight"]


def test_one_factor_of_lokr_for_all_layers_where_one_does(tmp_path):
    """PEFT's config has one; of a square layer alone the default would do too."""
    source, _ = saved(tmp_path, {"to_q": LoKr(rank=1, alpha=3, decompose_factor=2),
                                 "down_blocks.0": LoKr(rank=1, alpha=3, decompose_factor=2)}, Bare())
    convert_file(source, tmp_path / "l.safetensors", "lycoris")
    foreign = stripped(tmp_path / "l.safetensors", tmp_path / "f.safetensors")
    convert_file(foreign, tmp_path / "p", "peft", Bare())
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["decompose_factor"] == 2
    assert_same_tensors(content(source), content(tmp_path / "p"))


def test_biases_that_may_not_be_all(tmp_path):
    source, _ = saved(tmp_path, {"block.*": LoRA(rank=2), "block.*.bias": Full()})
    foreign = as_others_would(source, tmp_path / "f")
    convert_file(foreign, tmp_path / "n", "native")
    refused(tmp_path / "n", tmp_path / "p", "peft", "whether the trained biases are all of the model's is not known")
    convert_file(tmp_path / "n", tmp_path / "p", "peft", fresh("mixed"))
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["bias"] == "lora_only"


def test_weights_that_are_stored_turned(tmp_path):
    """transformers' Conv1D, seen by the sizes in the base's file."""
    source, model = saved(tmp_path, {"*c_attn": LoRA(rank=2)}, fresh("gpt2"))
    foreign = as_others_would(source, tmp_path / "f")
    state = fresh("gpt2").state_dict()
    save_file({name: tensor for name, tensor in state.items() if name != "lm_head.weight"}, tmp_path / "b.safetensors")
    convert_file(foreign, tmp_path / "n", "native", tmp_path / "b.safetensors")
    convert_file(tmp_path / "n", tmp_path / "p", "peft")
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    again = fresh("gpt2")
    veneer.load(again, tmp_path / "p")
    assert torch.equal(outputs(again, "gpt2"), outputs(model, "gpt2"))
    (tmp_path / "2").mkdir()
    source, _ = saved(tmp_path / "2", {"*c_attn": LoRA(rank=2), "*c_proj": Full()}, fresh("gpt2"))
    refused(as_others_would(source, tmp_path / "f2"), tmp_path / "x", "native", r"may be stored as \(in, out\)")


def test_a_pipeline_has_prefixes_for_its_parts(tmp_path):
    """unet.… and text_encoder.… are lora_unet_… and lora_te_… in kohya's files, and lora_te1_ where there are two."""
    pipe = nn.ModuleDict({"unet": nn.ModuleDict({"to_q": nn.Linear(4, 4)}),
                          "text_encoder": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})
    source, _ = saved(tmp_path, {"*": LoRA(rank=1)}, pipe)
    convert_file(source, tmp_path / "k.safetensors", "kohya")
    foreign = stripped(tmp_path / "k.safetensors", tmp_path / "f.safetensors")
    assert {key.partition(".")[0] for key in load_file(foreign)} == {"lora_unet_to_q", "lora_te_q_proj"}
    folder = tmp_path / "pipeline"
    for part, module in pipe.items():
        (folder / part).mkdir(parents=True)
        plain = {key: tensor for key, tensor in module.state_dict().items() if "adapters" not in key}
        save_file(plain, folder / part / "model.safetensors")
    (folder / "model_index.json").write_text("{}")
    convert_file(foreign, tmp_path / "p", "peft", folder)
    assert_same_tensors(content(source), content(tmp_path / "p"))
    pipe["text_encoder_2"] = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    veneer.detach(pipe)
    (tmp_path / "2").mkdir()
    source, _ = saved(tmp_path / "2", {"*": LoRA(rank=1)}, pipe)
    convert_file(source, tmp_path / "mine.safetensors", "kohya", prefix="mine")
    assert "mine_unet_to_q.alpha" in load_file(tmp_path / "mine.safetensors")
    convert_file(source, tmp_path / "2.safetensors", "kohya")
    stems = {key.partition(".")[0] for key in load_file(tmp_path / "2.safetensors")}
    assert stems == {"lora_unet_to_q", "lora_te1_q_proj", "lora_te2_q_proj"}


def test_a_folder_of_transformers_tells_the_layers_and_peft_loads_the_result(tmp_path):
    peft = pytest.importorskip("peft")
    source, model = saved(tmp_path, {"*q_proj": LoRA(rank=2), "*mlp.*": LoRA(rank=3)}, fresh("llama"))
    convert_file(source, tmp_path / "k.safetensors", "kohya")
    foreign = stripped(tmp_path / "k.safetensors", tmp_path / "f.safetensors")
    fresh("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()  # the config is enough
    convert_file(foreign, tmp_path / "p", "peft", tmp_path / "base")
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["task_type"]) == (["q_proj", "gate_proj", "up_proj", "down_proj"],
                                                               "CAUSAL_LM")
    loaded = peft.PeftModel.from_pretrained(fresh("llama"), str(tmp_path / "p")).eval()
    assert relative(outputs(loaded, "llama"), outputs(model, "llama")) < 1e-5
    convert_file(tmp_path / "k.safetensors", tmp_path / "own", "peft")  # without a base
    loaded = peft.PeftModel.from_pretrained(fresh("llama"), str(tmp_path / "own")).eval()
    assert relative(outputs(loaded, "llama"), outputs(model, "llama")) < 1e-5


def test_the_prefix_of_names(tmp_path):
    source, _ = saved(tmp_path, {"to_q": LoRA(rank=2)}, Bare())
    for form, usual in (("kohya", "lora_unet"), ("lycoris", "lycoris")):
        for prefix in (None, "lora_te", "mine"):
            target = tmp_path / f"{form}{prefix}.safetensors"
            convert_file(source, target, form, prefix=prefix)
            assert {key.partition(".")[0] for key in load_file(target)} == {f"{prefix or usual}_to_q"}
    foreign = stripped(tmp_path / "kohyamine.safetensors", tmp_path / "f.safetensors")
    says = "such as 'mine_to_q', end like modules of .*prefixes looked for: lora_unet, .*; 'mine' would fit"
    refused(foreign, tmp_path / "p", "peft", says, base=Bare())
    convert_file(foreign, tmp_path / "p", "peft", Bare(), prefix="mine")
    assert [record.name for record in content(tmp_path / "p").records] == ["to_q"]


def test_what_is_written_for_other_tools(tmp_path):
    """Keys, shapes and metadata as kohya's scripts have them."""
    source, _ = saved(tmp_path, {"to_q": LoRA(rank=2, alpha=3), "conv_in": LoRA(rank=2, alpha=3)}, Bare())
    convert_file(source, tmp_path / "k.safetensors", "kohya")
    tensors = load_file(tmp_path / "k.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "lora_unet_to_q.lora_down.weight": (2, 8), "lora_unet_to_q.lora_up.weight": (12, 2), "lora_unet_to_q.alpha": (),
        "lora_unet_conv_in.lora_down.weight": (2, 8, 3, 3), "lora_unet_conv_in.lora_up.weight": (6, 2, 1, 1),
        "lora_unet_conv_in.alpha": ()}
    assert tensors["lora_unet_to_q.alpha"] == 3
    assert tensors["lora_unet_to_q.alpha"].dtype == torch.float32
    (tmp_path / "2").mkdir()
    source, _ = saved(tmp_path / "2", {"to_q": LoRA(rank=2, alpha=0.1)}, Bare())
    convert_file(source, tmp_path / "2.safetensors", "kohya")
    assert load_file(tmp_path / "2.safetensors")["lora_unet_to_q.alpha"].item() == 0.1  # which fp32 does not hold
    from veneer.io.tensors import read_metadata

    meta = read_metadata(tmp_path / "k.safetensors")
    assert (meta["ss_network_module"], meta["ss_network_dim"], meta["ss_network_alpha"]) == ("networks.lora", "2", "3")


def test_lokr_of_two_whole_factors_has_its_scale_folded(tmp_path):
    """LyCORIS has none for it."""
    source, _ = saved(tmp_path, {"to_q": LoKr(rank=8, alpha=5.3)}, Bare())
    convert_file(source, tmp_path / "l.safetensors", "lycoris")
    tensors, (record,) = load_file(tmp_path / "l.safetensors"), content(source).records
    w1 = tensors["lycoris_to_q.lokr_w1"]
    torch.testing.assert_close(w1.float(), record.tensors["w1"] * (5.3 / 8))
    assert torch.equal(tensors["lycoris_to_q.lokr_w2"], record.tensors["w2"])
    assert tensors["lycoris_to_q.alpha"] == 8


def broken(tmp_path, change, name="b.safetensors"):
    """A LyCORIS file of `Bare` with something else in it."""
    tensors = {"lycoris_to_q.lora_down.weight": torch.ones(2, 8), "lycoris_to_q.lora_up.weight": torch.ones(12, 2),
               "lycoris_to_q.alpha": torch.tensor(2.0)}
    tensors |= {key: torch.as_tensor(value) for key, value in change.items() if value is not None}
    save_file({key: t for key, t in tensors.items() if change.get(key, 0) is not None}, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize(("change", "says"), [
    ({"lycoris_to_q.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "LoRA with a decomposed kernel"),
    ({"lycoris_norm.w_norm": torch.ones(3)}, "a change of a norm, which needs the base"),
    ({"lycoris_x.diff": torch.ones(3, 3)}, "a change of the whole weight, which needs the base"),
    ({"lycoris_x.what": torch.ones(3, 3)}, "not a part of LoRA, LoHa or LoKr"),
    ({"lycoris_to_q.lora_up.weight": None}, "is not whole: it has no lora_up.weight"),
    ({"lycoris_to_q.alpha": 0.0}, "alpha' is 0, which LyCORIS takes for the rank"),
    ({"lycoris_to_q.hada_w1_a": torch.ones(2, 2)}, "parts of more than one method: hada_w1_a"),
    ({"lycoris_to_q.dora_scale": torch.ones(1, 8)}, "lengths of inputs"),
    ({"lycoris_to_k.alpha": 1.0}, "'lycoris_to_k' is no module of the base; did you mean 'lycoris_to_q'"),
    ({"lycoris_conv_in.alpha": 1.0}, "nothing that these would belong to"),
    ({"lycoris_to_q.lora_up.weight": torch.ones(11, 2)}, r"lora_up.weight' is \(11, 2\) as B of 'to_q'"),
])
def test_files_that_are_not_whole_or_of_something_else(tmp_path, change, says):
    refused(broken(tmp_path, change), tmp_path / "n", "native", says, base=Bare())


def test_no_alpha_means_the_rank_and_is_noted(tmp_path):
    report = convert_file(broken(tmp_path, {"lycoris_to_q.alpha": None}), tmp_path / "n", "native", Bare())
    assert [record.method.scale for record in content(tmp_path / "n").records] == [1]
    assert report.notes == ("1 of 1 modules ('lycoris_to_q') have no alpha in the file: it was taken for the rank, a "
                            "scale of 1, as kohya's scripts and LyCORIS take it",)
    file = broken(tmp_path, {"lycoris_to_q.alpha": 3.0}, "c.safetensors")
    report = convert_file(file, tmp_path / "m", "native", Bare())
    assert [record.method.scale for record in content(tmp_path / "m").records] == [1.5]
    assert report.notes == ()


def test_a_lokr_of_two_whole_factors_needs_no_alpha(tmp_path):
    source, _ = saved(tmp_path, {"to_q": LoKr(rank=99)}, Bare())
    convert_file(source, tmp_path / "l.safetensors", "lycoris")
    tensors = {key: tensor for key, tensor in load_file(tmp_path / "l.safetensors").items() if "alpha" not in key}
    save_file(tensors, tmp_path / "f.safetensors")
    assert convert_file(tmp_path / "f.safetensors", tmp_path / "n", "native", Bare()).notes == ()


def test_one_changed_byte_is_damage(tmp_path):
    source, _ = saved(tmp_path, {"to_q": LoRA(rank=2)}, Bare())
    convert_file(source, tmp_path / "k.safetensors", "kohya")
    data = bytearray((tmp_path / "k.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "k.safetensors").write_bytes(data)
    refused(tmp_path / "k.safetensors", tmp_path / "n", "native", "k.safetensors is damaged, or another tool")
    assert main(["convert", str(tmp_path / "k.safetensors"), str(tmp_path / "n"), "--to", "native"]) == 2
    assert main(["convert", str(tmp_path / "k.safetensors"), str(tmp_path / "n"), "--to", "native", "--changed"]) == 0
    says = r"changed=True \(--changed\) is for kohya's and LyCORIS's files, and .*peft"
    refused(source, tmp_path / "m", "native", says, changed=True)


@pytest.mark.parametrize("form", ["kohya", "peft", "native"])
def test_a_cut_file_is_told_by_its_size(tmp_path, form):
    """As load and info tell it."""
    source, _ = saved(tmp_path, {"to_q": LoRA(rank=2)}, Bare())
    convert_file(source, at(tmp_path, form, "c"), form)
    file = {"kohya": "c.safetensors", "peft": "c/adapter_model.safetensors", "native": "c/veneer.safetensors"}[form]
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[:-20])
    refused(at(tmp_path, form, "c"), tmp_path / "n", "modelopt",
            f"not a complete safetensors file .*has {len(data) - 20:,} bytes, its header announces {len(data):,}")


def test_another_base_is_no_missing_one(tmp_path):
    """A base that has none of the names is said to be another one."""
    model, other = Bare(), nn.ModuleDict({"wide": nn.Linear(3, 4)})
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "odd.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    source, _ = saved(tmp_path, {"to_q": LoRA(rank=2, alpha=3)}, Bare())
    convert_file(source, tmp_path / "k.safetensors", "kohya")
    convert_file(source, tmp_path / "native", "native")
    others = as_others_would(source, tmp_path / "peft")
    for file in (stripped(tmp_path / "k.safetensors", tmp_path / "f.safetensors"), tmp_path / "native", others):
        for base, has in ((other, "such as 'wide'"), (tmp_path / "other.safetensors", "such as 'wide'"),
                          (tmp_path / "odd.safetensors", "none that holds a weight")):
            refused(file, tmp_path / "n", "modelopt", r"is of another base model than the one that is given \(base=, "
                    rf"--base\): none of its names is in it.*to_q.*modules of that base: {has}", base=base)
        refused(file, tmp_path / "n", "modelopt", "has no tensors, so that it is no base model",
                base=tmp_path / "empty.safetensors")
        refused(file, tmp_path / "n", "modelopt", r"there is no folder or file '.*nowhere' .*or one safetensors file",
                base=tmp_path / "nowhere")
        convert_file(file, tmp_path / "good", "modelopt", tmp_path / "base.safetensors", overwrite=True)
        assert_same_tensors(content(source), content(tmp_path / "good"))
    refused(tmp_path / "f.safetensors", tmp_path / "n", "native", "Give its base model .*or one safetensors file")


def test_peft_to_peft_keeps_the_short_names(tmp_path):
    """PEFT's config said which endings mean just these modules; whoever wrote it knew the model."""
    source, model = saved(tmp_path, {"block.*": LoRA(rank=2), "head": LoRA(rank=2)})
    foreign = as_others_would(source, tmp_path / "foreign")
    file = foreign / "adapter_config.json"
    config = json.loads(file.read_text())
    for targets, more, kept in (
            (["head", "0", "2"], {}, True), (r"head|block\.\d", {}, True), (["head", "0", "2", "gone"], {}, False),
            (["head", "0", "2"], {"exclude_modules": ["gone"]}, False)):
        file.write_text(json.dumps({**config, "target_modules": targets, **more}))
        convert_file(foreign, tmp_path / "again", "peft", overwrite=True)
        written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())["target_modules"]
        assert written == (targets if kept else ["block.0", "block.2", "head"])
        again = fresh("mixed")
        assert veneer.load(again, tmp_path / "again").problems == ()
        assert torch.equal(outputs(again, "mixed"), outputs(model, "mixed"))


def test_prefixes_and_names_that_mean_nothing(tmp_path):
    source, _ = saved(tmp_path, {"to_q": LoRA(rank=2)}, Bare())
    for prefix in ("", "lora.te"):
        says = f"prefix='{prefix}' .*cannot begin the names"
        refused(source, tmp_path / "k.safetensors", "kohya", says, prefix=prefix)
    says = r"prefix='x' \(--prefix\) is of kohya's and LyCORIS's files, and .*peft and is to be in native"
    refused(source, tmp_path / "n", "native", says, prefix="x")
    says = r"name='x' \(--name\) is of ModelOpt's directories, and .*peft and is to be in native"
    refused(source, tmp_path / "n", "native", says, name="x")


def test_the_format_that_is_said_is_the_one_there(tmp_path):
    source, _ = saved(tmp_path, {"to_q": LoHa(rank=2)}, Bare())
    convert_file(source, tmp_path / "l.safetensors", "lycoris")
    for file in (tmp_path / "l.safetensors", stripped(tmp_path / "l.safetensors", tmp_path / "f.safetensors")):
        refused(file, tmp_path / "n", "native", "is in the format lycoris, not kohya: .*more than LoRA", from_="kohya")
        assert convert_file(file, tmp_path / "n", "native", Bare(), from_="lycoris", overwrite=True).source_format == \
            "lycoris"
    says = "'to_q' has LoHa.*, not nemo: NeMo's files hold LoRA and DoRA"
    refused(source, tmp_path / "m", "native", says, from_="nemo")


def test_a_file_that_was_changed_since_is_read_by_its_tensors(tmp_path):
    source, _ = saved(tmp_path, {"to_q": LoRA(rank=2, alpha=3, dropout=0.5)}, Bare())
    convert_file(source, tmp_path / "k.safetensors", "kohya")
    from veneer.io.tensors import read_metadata

    tensors, meta = load_file(tmp_path / "k.safetensors"), read_metadata(tmp_path / "k.safetensors")
    tensors["lora_unet_to_q.alpha"] = torch.tensor(8.0)
    save_file(tensors, tmp_path / "k.safetensors", meta)
    refused(tmp_path / "k.safetensors", tmp_path / "n", "native",
            r"is damaged, or another tool has changed it: .*SHA-256 differs.*changed=True \(--changed\) takes its")
    report = convert_file(tmp_path / "k.safetensors", tmp_path / "n", "native", changed=True)
    assert any("was changed after Veneer wrote it" in note for note in report.notes)
    assert [(r.method.alpha, r.method.dropout) for r in content(tmp_path / "n").records] == [(8, 0.0)]


def test_what_the_files_of_peft_carry_of_the_base_is_not_dropped(tmp_path):
    source, _ = saved(tmp_path, {"block.0": LoRA(rank=2)})
    foreign = as_others_would(source, tmp_path / "f")
    tensors = load_file(foreign / "adapter_model.safetensors")
    tensors["base_model.model.embed.weight"] = torch.ones(20, 8)
    save_file(tensors, foreign / "adapter_model.safetensors")
    refused(foreign, tmp_path / "n", "native", "carries the base weight 'embed.weight', which is not trained")


def test_files_relative_to_a_base_without_its_start(tmp_path):
    source, _ = saved(tmp_path, {"block.0": LoRA(rank=2)})
    foreign = as_others_would(source, tmp_path / "f")
    config = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    refused(foreign, tmp_path / "n", "native", "relative to the base without its start")
