"""Files of adapters whose start is not zero: plain LoRA for other tools, PEFT's own both ways, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings

import pytest
import torch
from io_models import adapted, fresh, outputs, randomise, relative

import veneer
from veneer import DoRA, LoRA
from veneer.inits import LoftQ, TorchInit
from veneer.io.info import info
from veneer.io.store import NATIVE_TENSORS
from veneer.io.tensors import read_tensors
from veneer.method import VeneerError

peft = pytest.importorskip("peft")
BAR = 1e-5

BOTH = TorchInit(a="torch.nn.init.xavier_normal_", b="torch.nn.init.orthogonal_")
PISSA = LoRA(rank=4, alpha=6, init="pissa")

#: name → (base, rules)
WRITTEN = {
    "pissa": ("llama", PISSA),
    "pissa_niter": ("llama", {"*.q_proj": LoRA(rank=4, init="pissa_niter_2")}),
    "olora": ("llama", LoRA(rank=3, alpha=2, init="olora")),
    "torch": ("llama", {"*.q_proj": LoRA(rank=3, init=BOTH)}),
    "rslora": ("llama", LoRA(rank=5, alpha=7, rank_stabilized=True, init="pissa")),
    "rslora_on_some": ("llama", {"*.q_proj": LoRA(rank=3, rank_stabilized=True, init="pissa"),
                                 "*.v_proj": LoRA(rank=3)}),
    "ranks": ("llama", {"*": None, "*.q_proj": PISSA, "*.layers.1.*.q_proj": LoRA(rank=2, alpha=9, init="olora"),
                        "*.mlp.*": LoRA(rank=6, alpha=3), "lm_head": LoRA(rank=5, init="pissa")}),
    "dora": ("llama", DoRA(PISSA)),
    "bias": ("llama", {"*.q_proj": LoRA(rank=4, alpha=2, bias=True, init="pissa")}),
    "embedding": ("llama", {"*.embed_tokens": PISSA, "*.v_proj": LoRA(rank=2)}),
    "tied": ("llama_tied", {"*.embed_tokens": PISSA, "*.q_proj": LoRA(rank=2)}),
    "conv1d_linear": ("gpt2", {"*.c_attn": PISSA, "*.mlp.c_fc": LoRA(rank=2, init="olora")}),
    "convs": ("mixed", {"conv*": LoRA(rank=3, init="pissa"), "block.0": DoRA(LoRA(rank=2))}),
    "convs_plain": ("mixed", {"conv*": LoRA(rank=3, init="pissa"), "embed": LoRA(rank=2, init="olora")}),
}


def load_with_peft(base, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*([Mm]issing|did not match|not found|no module was).*")
        return peft.PeftModel.from_pretrained(base, str(path)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", WRITTEN)
def test_a_carried_start_comes_back_bit_equal(case, dtype, tmp_path):
    kind, rules = WRITTEN[case]
    model = adapted(fresh(kind).to(dtype), rules)
    report = veneer.save(model, tmp_path)
    assert report.format == ("native" if case == "convs" else "peft")
    other = fresh(kind).to(dtype)
    assert veneer.load(other, tmp_path).problems == ()
    assert torch.equal(outputs(other, kind), outputs(model, kind))
    assert all(torch.equal(a, b) for a, b in zip(fresh(kind).to(dtype).parameters(), veneer.detach(other).parameters(),
                                                 strict=True)), "the base keeps its bits"


@pytest.mark.parametrize("case", [case for case in WRITTEN if case != "convs"])
def test_peft_loads_it_as_plain_lora(case, tmp_path):
    kind, rules = WRITTEN[case]
    model = adapted(fresh(kind), rules)
    veneer.save(model, tmp_path)
    want = outputs(model, kind)
    assert relative(want, outputs(fresh(kind), kind)) > 1e-3
    assert relative(outputs(load_with_peft(fresh(kind), tmp_path), kind), want) < BAR
    # by PEFT's two files alone, as another tool would have written them
    (tmp_path / "veneer.json").unlink()
    other = fresh(kind)
    assert veneer.load(other, tmp_path).problems == ()
    assert relative(outputs(other, kind), want) < BAR


def test_the_file_says_plain_lora_of_twice_the_rank(tmp_path):
    model = adapted(fresh("llama"), {"*.q_proj": PISSA, "*.v_proj": LoRA(rank=3, alpha=3, init="pissa"),
                                     "*.up_proj": LoRA(rank=2)})
    veneer.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 12, True)
    assert config["rank_pattern"] == {"v_proj": 6, "up_proj": 2}
    assert config["alpha_pattern"] == {"v_proj": 6, "up_proj": 2}
    plan = json.loads((tmp_path / "veneer.json").read_text())["plan"]
    assert {(group["rank"], group["init"]) for group in plan} == {(8, "kaiming"), (6, "kaiming"), (2, "kaiming")}
    tensors, _ = read_tensors(tmp_path / "adapter_model.safetensors")
    adapter = model.model.layers[0].self_attn.q_proj.adapters["default"]["weight"]
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    assert torch.equal(tensors[f"{prefix}A.weight"], torch.cat([adapter.A - adapter.start_A, adapter.start_A]))
    assert torch.equal(tensors[f"{prefix}B.weight"], torch.cat([adapter.B, adapter.B - adapter.start_B], 1))
    assert "LoRA" in str(info(tmp_path))


@pytest.mark.parametrize("rank", range(1, 9))
@pytest.mark.parametrize("alpha", [None, 1.0, 7, 0.3])
def test_twice_the_rank_has_the_very_same_scale(rank, alpha):
    for stabilized in (False, True):
        method = LoRA(rank=rank, alpha=alpha, rank_stabilized=stabilized, init="pissa")
        pair = {"A": torch.ones(rank, 9), "B": torch.ones(8, rank)}
        plain, tensors = method.plain({**pair, **{f"start_{name}": tensor for name, tensor in pair.items()}})
        assert plain.rank == 2 * rank
        assert plain.scale == method.scale
        assert tensors["A"].shape == (2 * rank, 9)


def test_a_start_taken_out_of_the_base_is_saved_relative_to_the_base_as_it_was(tmp_path):
    model = adapted(fresh("llama"), {"*.q_proj": LoRA(rank=4, alpha=6, init="pissa", residual="base")})
    want = outputs(model, "llama")
    report = veneer.save(model, tmp_path)
    assert report.format == "peft"
    other = fresh("llama")
    veneer.load(other, tmp_path)
    assert relative(outputs(other, "llama"), want) < BAR
    assert relative(outputs(load_with_peft(fresh("llama"), tmp_path), "llama"), want) < BAR


def test_an_adapter_on_a_base_that_another_has_rewritten_is_told_of(tmp_path):
    model = adapted(fresh("llama"), {"*.q_proj": LoRA(rank=4, init="pissa", residual="base")}, name="first")
    assert not any("another adapter" in note for note in veneer.save(model, tmp_path / "first", name="first").notes)
    adapted(model, {"*.q_proj": LoRA(rank=2), "*.v_proj": LoRA(rank=2)}, name="second")
    notes = veneer.save(model, tmp_path / "second", name="second").notes
    assert any("the start of another adapter has rewritten the base weight 'model.layers.0.self_attn.q_proj' and 1 more"
               in note for note in notes)


MIXED = {"*.q_proj": PISSA, "*.v_proj": DoRA(LoRA(rank=2, init="olora"))}  # PEFT's config cannot say this


def test_natively_the_pair_and_its_start_are_kept(tmp_path, monkeypatch):
    model = adapted(fresh("llama"), MIXED)
    assert veneer.save(model, tmp_path).format == "native"
    tensors, _ = read_tensors(tmp_path / NATIVE_TENSORS)
    assert {key.rpartition("/")[2] for key in tensors} == {"A", "B", "start_A", "start_B", "magnitude", "inner.A",
                                                           "inner.B", "inner.start_A", "inner.start_B"}
    other = fresh("llama")
    monkeypatch.setattr(torch.linalg, "svd", None)  # nothing is decomposed where the file has it
    monkeypatch.setattr(torch.linalg, "qr", None)
    veneer.load(other, tmp_path)
    assert torch.equal(outputs(other, "llama"), outputs(model, "llama"))
    mine, theirs = ({k: v for k, v in m.state_dict().items() if ".adapters." in k} for m in (model, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(theirs[key], tensor) for key, tensor in mine.items())


def test_natively_what_was_taken_out_of_the_base_is_subtracted_by_the_adapter(tmp_path):
    rules = {"*.q_proj": LoRA(rank=4, init="pissa", residual="base"), "*.v_proj": DoRA(LoRA(rank=2))}
    model = adapted(fresh("llama"), rules)
    assert veneer.save(model, tmp_path).format == "native"
    other = fresh("llama")
    veneer.load(other, tmp_path)
    assert relative(outputs(other, "llama"), outputs(model, "llama")) < BAR
    method = other.model.layers[0].self_attn.q_proj.adapters["default"]["weight"].method
    assert method == LoRA(rank=4, init="pissa", residual="exact")


# -- onto an adapter that is there, as training goes on from a checkpoint --------------------------------------
@pytest.mark.parametrize("rules", [PISSA, DoRA(PISSA), MIXED, {"*.q_proj": LoRA(rank=4, init="pissa", residual="base")},
                                   {"*.q_proj": LoRA(rank=3, rank_stabilized=True, init="olora")}], ids=str)
def test_onto_an_adapter_of_the_same_start(rules, tmp_path):
    model = adapted(fresh("llama"), rules)
    report = veneer.save(model, tmp_path)
    other = fresh("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        veneer.attach(other, rules)
    before = dict(other.named_parameters())
    veneer.load(other, tmp_path)
    assert all(p is before[k] for k, p in other.named_parameters())
    for key, tensor in model.state_dict().items():
        if ".adapters." in key:
            # of A the file for other tools has A − A₀, so that A comes back within one rounding
            exact = report.format == "native" or not key.endswith(".A")
            assert torch.allclose(other.state_dict()[key], tensor, rtol=0 if exact else 1e-6,
                                  atol=0 if exact else 1e-7), key
    assert relative(outputs(other, "llama"), outputs(model, "llama")) < BAR


def test_onto_an_adapter_of_another_start(tmp_path):
    veneer.save(adapted(fresh("llama"), {"*.q_proj": PISSA}), tmp_path)
    other = veneer.attach(fresh("llama"), {"*.q_proj": LoRA(rank=4, alpha=6, init="olora")})
    with pytest.raises(VeneerError, match=r"q_proj' began from another pair of factors in the file than on this model"):
        veneer.load(other, tmp_path)
    plain = veneer.attach(fresh("llama"), {"*.q_proj": LoRA(rank=4, alpha=6)})
    with pytest.raises(VeneerError, match=r"is LoRA\(rank=8, alpha=12\) in the file and LoRA\(rank=4, alpha=6\)"):
        veneer.load(plain, tmp_path)


def test_native_files_of_another_start(tmp_path):
    veneer.save(adapted(fresh("llama"), MIXED), tmp_path)
    other = adapted(fresh("llama"), {"*.q_proj": LoRA(rank=4, alpha=6, init="olora", residual="base"),
                                     "*.v_proj": DoRA(LoRA(rank=2))})
    with pytest.raises(VeneerError, match=r"began from another pair of factors") as found:
        veneer.load(other, tmp_path)
    assert str(found.value).count("began from another pair") == 4


# -- what PEFT wrote -------------------------------------------------------------------------------------------
READ = {
    "pissa": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": "pissa"}),
    "olora": ("llama", {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"],
                        "init_lora_weights": "olora"}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True,
                         "init_lora_weights": "pissa"}),
    "dora": ("llama", {"r": 4, "target_modules": ["q_proj", "up_proj"], "use_dora": True,
                       "init_lora_weights": "pissa"}),
    "patterns": ("llama", {"r": 4, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2},
                           "alpha_pattern": {"q_proj": 5}, "init_lora_weights": "olora"}),
    "head": ("llama", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "all",
                       "init_lora_weights": "pissa"}),
    "conv1d": ("gpt2", {"r": 4, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj"], "init_lora_weights": "pissa"}),
}


def written_by_peft(kind, options, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(fresh(kind), peft.LoraConfig(**options)).eval()
        randomise(model)
        model.save_pretrained(str(path))
    return model


@pytest.mark.parametrize("case", READ)
def test_peft_files_relative_to_a_residue(case, tmp_path):
    kind, options = READ[case]
    theirs = written_by_peft(kind, options, tmp_path / "peft")
    want = outputs(theirs, kind)
    assert relative(outputs(load_with_peft(fresh(kind), tmp_path / "peft"), kind), want) < BAR
    assert relative(want, outputs(fresh(kind), kind)) > 1e-3
    model = fresh(kind)
    assert veneer.load(model, tmp_path / "peft").problems == ()
    assert relative(outputs(model, kind), want) < BAR
    # once more through our own file, which is plain LoRA
    assert veneer.save(model, tmp_path / "veneer").format == "peft"
    assert relative(outputs(load_with_peft(fresh(kind), tmp_path / "veneer"), kind), want) < BAR
    # and onto an adapter that is there
    again = fresh(kind)
    veneer.load(again, tmp_path / "peft")
    randomise(again)
    veneer.load(again, tmp_path / "peft")
    assert torch.equal(outputs(again, kind), outputs(model, kind))


def test_peft_files_relative_to_a_residue_need_an_adapter_that_carries_it(tmp_path):
    written_by_peft(*READ["olora"], tmp_path)
    plain = veneer.attach(fresh("llama"), {"*.q_proj": LoRA(rank=3, alpha=6), "*.down_proj": LoRA(rank=3, alpha=6)})
    with pytest.raises(VeneerError, match=r"is LoRA\(rank=3, alpha=6, init='olora'\) in the file and "
                                          r"LoRA\(rank=3, alpha=6\) on this model"):
        veneer.load(plain, tmp_path)


def test_peft_files_relative_to_a_residue_need_the_base_as_it_was(tmp_path):
    written_by_peft(*READ["olora"], tmp_path)
    model = veneer.attach(fresh("llama"), {"*.q_proj": LoRA(rank=2, init="pissa", residual="base")}, name="other")
    with pytest.raises(VeneerError, match=r"q_proj' begins at the base weight that it was trained on, and the start of "
                                          r"another adapter has rewritten that one here"):
        veneer.load(model, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
def test_files_that_peft_converted(init, tmp_path):
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": init}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(fresh("llama"), peft.LoraConfig(**options)).eval()
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(str(tmp_path / "start"))
        model.peft_config["default"].init_lora_weights = init
        randomise(model)
        want = outputs(model, "llama")
        model.save_pretrained(str(tmp_path / "converted"),
                              path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = fresh("llama")
    assert veneer.load(ours, tmp_path / "converted").problems == ()
    assert relative(outputs(ours, "llama"), want) < BAR
    assert ours.model.layers[0].self_attn.q_proj.adapters["default"]["weight"].method.rank == 8


@pytest.mark.parametrize("init", ["orthogonal", "gaussian", "eva"])
def test_starts_that_leave_the_base_alone_are_plain(init, tmp_path):
    options = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": init}
    theirs = written_by_peft("llama", options, tmp_path)
    model = fresh("llama")
    veneer.load(model, tmp_path)
    assert relative(outputs(model, "llama"), outputs(theirs, "llama")) < BAR


@pytest.fixture(scope="module")
def plain_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    written_by_peft("llama", {"r": 4, "target_modules": ["q_proj"]}, path)
    return path


@pytest.mark.parametrize(("start", "says"), [
    ("pissa_niter_4", "init_lora_weights='pissa_niter_4' changed the base weights when training began, and this file "
                      "is relative to the changed ones. They cannot be made again without its random numbers"),
    ("corda", "without the data it was given, which it does not hold. Where it was trained, PEFT can make plain LoRA "
              "of it: model.save_pretrained(…, path_initial_model_for_weight_conversion=…)"),
    ("lora_ga", "without the data it was given"),
    ("loftq", "without the quantised weights themselves, which it does not hold. Where it was trained, merge it"),
    ("pisa", "unknown init_lora_weights='pisa'; did you mean 'pissa'?"),
])
def test_residues_that_cannot_be_made_again_are_refused(plain_file, tmp_path, start, says):
    shutil.copytree(plain_file, tmp_path / "file")
    config = tmp_path / "file" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": start}))
    with pytest.raises(VeneerError) as found:
        veneer.load(fresh("llama"), tmp_path / "file")
    assert says in str(found.value)


@pytest.mark.parametrize(("kind", "targets", "start", "says"), [
    ("gpt2", ["c_attn"], "olora", "a weight of kind conv1d: what PEFT left of such a weight cannot be made again here"),
    ("llama_tied", ["embed_tokens"], "pissa", "'model.embed_tokens', a tied weight: what PEFT left"),
    ("mixed", ["conv1"], "pissa", "a weight of kind conv: what PEFT left"),
    ("mixed", ["attention"], "pissa", "a weight of kind out_proj: what PEFT left"),
])
def test_residues_of_weights_where_peft_does_otherwise(kind, targets, start, says, tmp_path):
    options = {"r": 4, "target_modules": targets, "ensure_weight_tying": kind == "llama_tied"}
    written_by_peft(kind, options, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": start}))
    with pytest.raises(VeneerError) as found:
        veneer.load(fresh(kind), tmp_path)
    assert says in str(found.value)


def test_residues_of_parameters(tmp_path):
    written_by_peft("mixed", {"r": 4, "target_modules": [], "target_parameters": ["block.0.weight"]}, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": "pissa"}))
    with pytest.raises(VeneerError, match="a weight of kind parameter: what PEFT left of such a weight"):
        veneer.load(fresh("mixed"), tmp_path)


# -- starts that give the base anew ----------------------------------------------------------------------------
def test_a_rewritten_base_is_made_again_from_the_same_base(tmp_path):
    rules = {"*.q_proj": LoRA(rank=4, init=LoftQ(packed=False))}
    model = adapted(fresh("llama"), rules)
    report = veneer.save(model, tmp_path)
    assert report.format == "native"
    assert "rewrote the base weight 'model.layers.0.self_attn.q_proj'" in report.reason
    other = fresh("llama")
    veneer.load(other, tmp_path)
    assert torch.equal(outputs(other, "llama"), outputs(model, "llama"))


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_a_start_from_statistics_is_loaded_without_them(init, tmp_path):
    model = fresh("llama")
    made = veneer.plan(model, {"*.q_proj": LoRA(rank=2, init=init)})
    made.entries = [dataclasses.replace(entry, given=True) for entry in made.entries]
    veneer.attach(model, made)
    randomise(model)
    for name in ("once", "again"):
        veneer.save(model, tmp_path / name)
        other = fresh("llama")
        veneer.load(other, tmp_path / name)
        assert torch.equal(outputs(other, "llama"), outputs(model, "llama"))
        model = other
