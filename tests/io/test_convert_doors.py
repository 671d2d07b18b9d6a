"""convert_file: what a format cannot hold, and the settings of the front doors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from convert_helpers import (
    BOTH,
    as_others_would,
    assert_equal,
    at,
    content,
    refused,
    saved,
)
from io_models import fresh, outputs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from veneer import DoRA, Full, LoHa, LoRA, VeRA, convert_file
from veneer.formats.content import FORMATS, META_MODELOPT
from veneer.formats.read import MODELOPT_STATE, NEMO_SETTINGS
from veneer.method import VeneerError
from veneer.train.cli import main

MIXED_RULES = {"block.0": LoRA(rank=2), "head": LoRA(rank=3)}
LOSSY = [
    ({"block.0": DoRA(LoRA(rank=2))}, "kohya", "kohya's files have no lengths; LyCORIS's have"),
    ({"block.0": LoHa(rank=2)}, "kohya", "'block.0' has LoHa.*these files have LoRA"),
    ({"block.0": VeRA(rank=2)}, "lycoris", "'block.0' has VeRA.*these files have LoRA and LoHa and LoKr"),
    ({"embed": LoRA(rank=2)}, "lycoris", "'embed' is of kind embedding"),
    ({"attention.in_proj_weight": LoRA(rank=2)}, "kohya",
     "is of kind attention; these files adapt linear layers and convolutions"),
    ({"block.0": LoRA(rank=2, bias=True)}, "kohya", "no added bias"),
    ({"block.0": LoRA(rank=2), "head": Full()}, "lycoris", "'head' has Full"),
    ({"block.0": LoRA(rank=2, alpha=0)}, "kohya", "alpha of 0, which LyCORIS takes for the rank"),
    (MIXED_RULES, "nemo", "NeMo has one dim and one alpha for all layers"),
    ({"block.0": LoRA(rank=2, alpha=2), "head": LoRA(rank=2, alpha=3)}, "nemo", "NeMo has one dim and one alpha"),
    ({"block.0": LoRA(rank=2), "head": DoRA(LoRA(rank=2))}, "nemo", "some weights have DoRA and some LoRA"),
    ({"conv2": LoRA(rank=2)}, "nemo", "'conv2' is of kind conv; NeMo adapts linear layers"),
    ({"block.0": LoHa(rank=2)}, "nemo", "NeMo has LoRA and DoRA"),
    ({"block.0": LoRA(rank=2, rank_stabilized=True)}, "nemo", "NeMo has no rank_stabilized=True"),
    ({"block.0": LoRA(rank=2, bias=True)}, "nemo", "NeMo has no bias=True"),
    ({"block.0": LoRA(rank=2), "head": Full()}, "nemo", "'head' has Full"),
    ({"block.0": DoRA(LoRA(rank=2))}, "modelopt", "ModelOpt has LoRA alone"),
    ({"block.0": LoRA(rank=2, alpha=-1)}, "modelopt", "ModelOpt's is above 0"),
    ({"block.0": LoRA(rank=2, bias=True)}, "modelopt", "ModelOpt has no added bias"),
    ({"block.0": LoRA(rank=2, dtype="float64")}, "modelopt", "ModelOpt has bfloat16, float16, float32"),
    ({"block.0": LoRA(rank=2), "head": LoHa(rank=2)}, "peft", "a PEFT file has one method"),
    ({"block.0": LoHa(rank=2), "embed": LoHa(rank=2)}, "peft", r"\(veneer\.to_lora\(model\) makes plain LoRA of it"),
    ({"block.0": DoRA(LoHa(rank=2))}, "peft", r"which PEFT does not have \(veneer\.to_lora\(model\) makes"),
]


@pytest.mark.parametrize(("rules", "to", "says"), LOSSY)
def test_what_would_be_lost_is_said(tmp_path, rules, to, says):
    source, _ = saved(tmp_path, rules)
    (tmp_path / "out").mkdir()
    refused(source, at(tmp_path / "out", to, "x"), to, f"cannot be converted to {to}, which would lose this: .*{says}")


def test_buffers_are_still_known(tmp_path):
    model = nn.ModuleDict({"lin": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
    source, _ = saved(tmp_path, {"lin": LoRA(rank=1), "norm.*": Full()}, model)
    refused(source, tmp_path / "p", "peft", "'norm' has buffers, which modules_to_save would save too")


def test_groups_padding_and_ties_are_refused(tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = nn.Conv2d(8, 8, 3, groups=2)
            self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
            self.a_b, self.a = nn.Linear(4, 4), nn.ModuleDict({"b": nn.Linear(4, 4)})

    for i, (rules, says) in enumerate([
            ({"grouped": LoRA(rank=2)}, "a convolution with groups=2"),
            ({"circular": LoHa(rank=2)}, "a convolution with padding_mode='circular'"),
            ({"a_b": LoRA(rank=2), "a.b": LoRA(rank=2)}, "'a_b' and 'a.b' would both be 'lycoris_a_b'")]):
        (tmp_path / str(i)).mkdir()
        source, _ = saved(tmp_path / str(i), rules, Odd())
        refused(source, tmp_path / str(i) / "x.safetensors", "lycoris", says)
    (tmp_path / "g").mkdir()
    source, _ = saved(tmp_path / "g", {"grouped": LoHa(rank=2)}, Odd())
    convert_file(source, tmp_path / "g.safetensors", "lycoris")
    convert_file(tmp_path / "g.safetensors", tmp_path / "back", "peft")
    assert_equal(content(source), content(tmp_path / "back"))
    source, _ = saved(tmp_path, {"*lm_head": LoRA(rank=2)}, fresh("llama_tied"))
    refused(source, tmp_path / "x.safetensors", "lycoris", "is of kind embedding|is tied")




def test_settings_of_nemo_travel(tmp_path):
    from veneer.nemo import PeftConfig, apply_lora_to_linear_modules, load_adapter, read_config, save_adapter

    config = PeftConfig(target_modules=["*proj"], dim=4, alpha=8, dropout=0.1, dropout_position="post", use_triton=True)
    model = fresh("llama")
    apply_lora_to_linear_modules(model, config)
    with torch.no_grad():
        for param in veneer.trainable(model):
            param.normal_()
    save_adapter(model, config, tmp_path / "nemo")
    for form in FORMATS:
        if form != "nemo":
            convert_file(tmp_path / "nemo", at(tmp_path, form, f"b-{form}"), form)
            convert_file(at(tmp_path, form, f"b-{form}"), tmp_path / f"c-{form}", "nemo")
            texts = [(tmp_path / path / NEMO_SETTINGS).read_text() for path in (f"c-{form}", "nemo")]
            assert texts[0] == texts[1]
            assert read_config(tmp_path / f"c-{form}") == read_config(tmp_path / "nemo")
            assert_equal(content(tmp_path / "nemo"), content(tmp_path / f"c-{form}"))
            load_adapter(again := fresh("llama"), tmp_path / f"c-{form}")
            assert torch.equal(outputs(again, "llama"), outputs(model.eval(), "llama"))


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "nemo"])
def test_what_nemo_itself_wrote(tmp_path, form):
    """tests/nemo/golden: without anything of Veneer's in it."""
    golden = Path(__file__).parent.parent / "nemo" / "golden" / "ckpt"
    convert_file(golden, at(tmp_path, form, "b"), form)
    convert_file(at(tmp_path, form, "b"), tmp_path / "c", "nemo")
    first, last = (load_file(path / "adapter_model.safetensors") for path in (golden, tmp_path / "c"))
    assert set(first) == set(last)
    assert all(torch.equal(first[key], last[key]) and first[key].dtype == last[key].dtype for key in first)
    for file in ("adapter_config.json", NEMO_SETTINGS):
        said = [json.loads((path / file).read_text()) for path in (golden, tmp_path / "c")]
        assert said[0] == said[1]


def test_nemo_gets_settings_of_its_own(tmp_path):
    from veneer.nemo import load_adapter, read_config

    source, model = saved(tmp_path, {"*q_proj": LoRA(rank=2, alpha=3, dropout=0.25, init="xavier")}, fresh("llama"))
    report = convert_file(source, tmp_path / "nemo", "nemo")
    assert set(report.files) == {"adapter_model.safetensors", "adapter_config.json", NEMO_SETTINGS, "veneer.json"}
    found = read_config(tmp_path / "nemo")
    assert (found.dim, found.alpha, found.dropout, found.dropout_position, found.lora_A_init) == \
        (2, 3, 0.25, "pre", "xavier")
    assert len(found.target_modules) == 2
    assert not found.use_dora
    load_adapter(again := fresh("llama"), as_others_would(tmp_path / "nemo", tmp_path / "f"))
    assert torch.equal(outputs(again, "llama"), outputs(model, "llama"))
    (tmp_path / "f" / NEMO_SETTINGS).write_text((tmp_path / "nemo" / NEMO_SETTINGS).read_text())
    convert_file(tmp_path / "f", tmp_path / "n", "native")  # as NeMo would have written it
    method = content(tmp_path / "n").records[0].method
    assert (method.dropout, method.dropout_on, method.init) == (0.25, "input", "xavier")


def test_modelopts_state_travels(tmp_path):
    from veneer import modelopt

    config = {"adapter_name": "mine", "freeze_lora_weights": True,
              "adapter_cfg": {"*": {"enable": False}, "block*": {"enable": True, "rank": 2, "scale": 0.3}}}
    model = modelopt.update_model(fresh("mixed"), config)
    with torch.no_grad():
        for adapter in veneer.adapters(model)["mine"].weights.values():
            adapter.B.normal_()
    modelopt.save(model, tmp_path / "m")
    for form in ("native", "peft", "kohya"):
        convert_file(tmp_path / "m", at(tmp_path, form, f"b-{form}"), form)
        convert_file(at(tmp_path, form, f"b-{form}"), tmp_path / f"c-{form}", "modelopt")
        mode, = json.loads((tmp_path / f"c-{form}" / MODELOPT_STATE).read_text())["modelopt_state_dict"]
        assert mode == json.loads((tmp_path / "m" / MODELOPT_STATE).read_text())["modelopt_state_dict"][0]
        assert_equal(content(tmp_path / "m"), content(tmp_path / f"c-{form}"))
        again = modelopt.restore(fresh("mixed"), tmp_path / f"c-{form}")
        assert torch.equal(outputs(again, "mixed"), outputs(model, "mixed"))
        assert not veneer.trainable(again)


def test_modelopt_restores_what_came_from_elsewhere(tmp_path):
    from veneer import modelopt
    from veneer.modelopt import files

    assert MODELOPT_STATE == files.STATE
    other = LoRA(rank=3, dtype="bfloat16", init="torch.nn.init.xavier_normal_")
    source, model = saved(tmp_path, {"block.0": LoRA(rank=2, alpha=3), "head": other})
    convert_file(source, tmp_path / "m", "modelopt", name="mine")
    again = modelopt.restore(fresh("mixed"), tmp_path / "m")
    assert torch.equal(outputs(again, "mixed"), outputs(model, "mixed"))
    assert set(veneer.adapters(again)) == {"mine"}
    state = json.loads((tmp_path / "m" / MODELOPT_STATE).read_text())["modelopt_state_dict"][0][1]["config"]
    fresh_model = modelopt.update_model(fresh("mixed"), state)  # the config alone makes the same layers
    made = {name: a.method for name, a in veneer.adapters(fresh_model)["mine"].weights.items()}
    assert {name: (m.rank, m.scale, m.dtype) for name, m in made.items()} == {
        "block.0": (2, 1.5, None), "head": (3, 1, torch.bfloat16)}
    start = made["head"].start_rule
    assert (start.a, start.b) == ("torch.nn.init.xavier_normal_", "torch.nn.init.zeros_")


def test_several_adapters_and_layers_that_are_off(tmp_path):
    from veneer import modelopt

    model = fresh("mixed")
    for name in ("one", "two"):
        modelopt.update_model(model, {"adapter_name": name})
    modelopt.save(model, tmp_path / "m")
    refused(tmp_path / "m", tmp_path / "p", "peft", r"has 2 adapters \(one, two\).*name= \(--name\) says which")
    convert_file(tmp_path / "m" / "one", tmp_path / "p", "native")
    single = modelopt.update_model(fresh("mixed"), {"adapter_name": "one"})
    modelopt.disable_adapters(single, "head")
    modelopt.save(single, tmp_path / "s")
    refused(tmp_path / "s", tmp_path / "q", "peft", r"'one' is off in 1 layers \('head'\)")


def two_adapters(tmp_path: Path) -> Path:
    """A directory of ModelOpt's with the adapters "one", of rank 1, and "two", of rank 2."""
    from veneer import modelopt

    model = fresh("mixed")
    for rank, name in ((1, "one"), (2, "two")):
        layers = {"*": {"enable": False}, "block*": {"enable": True, "rank": rank}}
        modelopt.update_model(model, {"adapter_name": name, "adapter_cfg": layers})
    modelopt.save(model, tmp_path / "m")
    return tmp_path / "m"


def test_the_name_says_which_adapter_is_read(tmp_path, capsys):
    source = two_adapters(tmp_path)
    for rank, name in ((1, "one"), (2, "two")):
        assert main(["convert", str(source), str(tmp_path / name), "--to", "native", "--name", name]) == 0
        assert {record.method.rank for record in content(tmp_path / name).records} == {rank}
        convert_file(source, tmp_path / f"m-{name}", "modelopt", name=name)  # where it keeps its name
        assert names_in(tmp_path / f"m-{name}") == [name]
        assert {record.method.rank for record in content(tmp_path / f"m-{name}").records} == {rank}
    says = r"there is no adapter 'tow' \(name=, --name\): .* has 2 adapters \(one, two\); did you mean 'two'"
    for form in ("native", "modelopt"):
        refused(source, tmp_path / "x", form, says, name="tow")
    refused(tmp_path / "m-one", tmp_path / "x", "native", "there is no adapter 'two'.*has 1 adapters", name="two")
    convert_file(tmp_path / "m-one", tmp_path / "new", "modelopt", name="three")  # a new name for the only one
    assert names_in(tmp_path / "new") == ["three"]


def test_info_and_load_know_a_directory_of_modelopts(tmp_path, capsys):
    source = two_adapters(tmp_path)
    says = (f"{source} is in ModelOpt's format (modelopt_state.json), with its adapters in directories of their own "
            f"(one, two): give the directory of one of them, such as {source / 'one'}. Or convert it: `veneer convert "
            f"{source} DIRECTORY --to peft --name one`. veneer.modelopt.restore reads it as it is")
    for ask in (veneer.info, lambda path: veneer.load(fresh("mixed"), path)):
        with pytest.raises(VeneerError) as caught:
            ask(source)
        assert str(caught.value) == says
    assert main(["info", str(source)]) == 2
    assert says in capsys.readouterr().err
    assert veneer.info(source / "one").adapters[0].weights == 2
    shutil.rmtree(source / "one")
    with pytest.raises(VeneerError, match=r"\(two\): .* --to peft`\. "):
        veneer.info(source)
    shutil.rmtree(source / "two")
    with pytest.raises(VeneerError, match=r"\(none\): it has none"):
        veneer.info(source)


@pytest.mark.parametrize(("case", "to"), [
    *((case, to) for case in ("adalora", "vera", "vblora", "randlora")
      for to in ("kohya", "lycoris", "nemo", "modelopt")),
    *((case, to) for case in ("loha", "lokr") for to in ("kohya", "nemo", "modelopt"))])
def test_the_way_out_for_methods_that_a_format_does_not_have(tmp_path, case, to):
    source, model = saved(tmp_path, BOTH[case][0])
    (tmp_path / "out").mkdir()
    says = r"'block.0' has .*\(veneer\.to_lora\(model\) makes plain LoRA of it"
    refused(source, at(tmp_path / "out", to, "x"), to, says)
    veneer.to_lora(model, 2)
    veneer.save(model, tmp_path / "lora")
    convert_file(tmp_path / "lora", at(tmp_path / "out", to, "x"), to)


def test_the_way_out_for_lengths(tmp_path):
    source, model = saved(tmp_path, {"block.0": DoRA(LoRA(rank=2))})
    for to in ("kohya", "modelopt"):
        refused(source, at(tmp_path, to, "x"), to, r"\(veneer\.to_lora\(model, extract=True\) makes plain LoRA of it")
    veneer.to_lora(model, 3, extract=True)
    veneer.save(model, tmp_path / "lora")
    convert_file(tmp_path / "lora", tmp_path / "x.safetensors", "kohya")
    (tmp_path / "full").mkdir()
    source, _ = saved(tmp_path / "full", {"block.0": LoRA(rank=2), "head": Full()})
    with pytest.raises(VeneerError, match="'head' has Full") as caught:
        convert_file(source, tmp_path / "y.safetensors", "lycoris")
    assert "to_lora" not in str(caught.value)


# -- names in a directory of ModelOpt's -----------------------------------------------------------------------
def from_modelopt(tmp_path: Path) -> Path:
    """A native adapter whose header knows that it was called "one" in ModelOpt."""
    source, _ = saved(tmp_path, {"block.0": LoRA(rank=2)})
    convert_file(source, tmp_path / "first", "modelopt", name="one")
    convert_file(tmp_path / "first", tmp_path / "native", "native")
    return tmp_path / "native"


def names_in(path: Path) -> list[str]:
    modes = json.loads((path / MODELOPT_STATE).read_text())["modelopt_state_dict"]
    return [mode["config"]["adapter_name"] for _, mode in modes]


def test_a_name_that_is_given_wins_over_the_one_in_modelopt(tmp_path):
    source, out = from_modelopt(tmp_path), tmp_path / "out"
    (out / "one").mkdir(parents=True)
    (out / "one" / "adapter_model.safetensors").write_text("another adapter")
    convert_file(source, out, "modelopt", name="two")
    assert names_in(out) == ["two"]
    assert (out / "one" / "adapter_model.safetensors").read_text() == "another adapter"
    convert_file(out / "two", tmp_path / "again", "modelopt")  # the file itself knows its new name
    assert names_in(tmp_path / "again") == ["two"]
    assert_equal(content(source), content(tmp_path / "again"))


def test_the_name_from_modelopt_is_the_one_that_is_looked_at(tmp_path):
    source, out = from_modelopt(tmp_path), tmp_path / "out"
    (out / "one").mkdir(parents=True)
    (out / "one" / "adapter_model.safetensors").write_text("another adapter")
    refused(source, out, "modelopt", "one/adapter_model.safetensors is there already; overwrite=True .* replaces it "
            r"\(the adapter 'one'; others there stay\)")
    assert (out / "one" / "adapter_model.safetensors").read_text() == "another adapter"
    assert main(["convert", str(source), str(out), "--to", "modelopt", "--overwrite"]) == 0
    assert names_in(out) == ["one"]
    assert_equal(content(source), content(out))


def test_other_adapters_stay_in_modelopts_state(tmp_path):
    from veneer import modelopt

    source, model = saved(tmp_path, {"block.0": LoRA(rank=2)})
    out = tmp_path / "m"
    convert_file(source, out, "modelopt", name="one")
    refused(source, out, "modelopt", f"{MODELOPT_STATE} is there already", name="two")
    report = convert_file(source, out, "modelopt", name="two", overwrite=True)
    assert names_in(out) == ["one", "two"]
    assert report.notes == (f"{MODELOPT_STATE} was there already: what else it says (1 entries) stays in it",)
    convert_file(source, out, "modelopt", name="one", overwrite=True)
    assert sorted(names_in(out)) == ["one", "two"]
    again = modelopt.restore(fresh("mixed"), out)
    assert set(veneer.adapters(again)) == {"one", "two"}
    veneer.activate(again, "two")
    assert torch.equal(outputs(again, "mixed"), outputs(model, "mixed"))


@pytest.mark.parametrize(("state", "says"), [("{", "is not JSON"), ("{}", "is damaged: KeyError"),
                                             ('{"modelopt_state_dict": [1]}', "is damaged: TypeError")])
def test_a_damaged_state_is_not_written_over(tmp_path, state, says):
    source, _ = saved(tmp_path, {"block.0": LoRA(rank=2)})
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / MODELOPT_STATE).write_text(state)
    refused(source, tmp_path / "m", "modelopt", says, overwrite=True)
    assert (tmp_path / "m" / MODELOPT_STATE).read_text() == state


@pytest.mark.parametrize("name", ["../out", "..", "", MODELOPT_STATE])
def test_names_that_are_no_directorys(tmp_path, name):
    source = from_modelopt(tmp_path)
    refused(source, tmp_path / "m", "modelopt", f"name={name!r} is to be that of a directory", name=name)
    file = tmp_path / "native" / "veneer.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    said = json.loads(header[META_MODELOPT])
    said["config"]["adapter_name"] = name
    save_file(tensors, file, {**header, META_MODELOPT: json.dumps(said)})
    if name:
        refused(source, tmp_path / "m", "modelopt", f"name={name!r} is to be that of a directory")
    del said["config"]
    save_file(tensors, file, {**header, META_MODELOPT: json.dumps(said)})
    refused(source, tmp_path / "m", "modelopt", "is damaged: it has no config with a name")


def test_the_adapters_own_directory_is_no_target(tmp_path):
    source, _ = saved(tmp_path, {"block.0": LoRA(rank=2)})
    convert_file(source, tmp_path / "m", "modelopt", name="one")
    refused(tmp_path / "m" / "one", tmp_path / "m", "modelopt", "is where the source is", name="one", overwrite=True)
