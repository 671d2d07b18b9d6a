"""save → load into a fresh model gives the same bits; what the reports and info say."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
from io_models import adapted, fresh, outputs
from torch import nn

import veneer
from veneer import DoRA, Full, LoRA, Rows
from veneer.io.tensors import content_hash, read_tensors, write_tensors
from veneer.method import VeneerError

EVERYTHING = {"embed": Rows([3, 4]), "conv*": LoRA(rank=2, alpha=5), "block.*": DoRA(LoRA(rank=3)),
              "attention.*": LoRA(rank=2), "attention.*bias": None, "norm": Full(), "head": Full(), "head.bias": None}


class Experts(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        shapes = [(3, 8, 12), (3, 12, 8)]
        self.up, self.down = (nn.Parameter(torch.randn(s if transposed else s[:1] + s[:0:-1])) for s in shapes)

    def forward(self, x):
        up, down = (w if self.is_transposed else w.mT for w in (self.up, self.down))
        return (torch.relu(x @ up) @ down).mean(0)


class Routed(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.experts, self.head = nn.Embedding(20, 8), Experts(transposed), nn.Linear(8, 8)

    def forward(self, ids):
        x = self.embed(ids).reshape(-1, 8)
        return self.head(x + self.experts(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rules", [EVERYTHING, {"conv*": LoRA(rank=2), "head": Full()}], ids=["native", "peft"])
def test_bits_come_back_in_every_dtype(dtype, rules, tmp_path):
    model = adapted(fresh("mixed").to(dtype), rules)
    report = veneer.save(model, tmp_path)
    assert report.format == ("native" if rules is EVERYTHING else "peft")
    other = fresh("mixed").to(dtype)
    veneer.load(other, tmp_path)
    assert torch.equal(outputs(other, "mixed"), outputs(model, "mixed"))
    mine, theirs = (veneer.adapters(m)["default"].weights for m in (model, other))
    assert {n: a.method for n, a in mine.items()} == {n: a.method for n, a in theirs.items()}
    assert all(p.requires_grad for p in veneer.trainable(other))
    assert [p.dtype for p in veneer.trainable(other)] == [p.dtype for p in veneer.trainable(model)]
    veneer.detach(other)
    base = fresh("mixed").to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), base.parameters(), strict=True))


def test_adapters_cast_after_attach_come_back_in_that_dtype(tmp_path):
    model = adapted(fresh("mixed"), {"block.*": LoRA(rank=2)}).bfloat16()
    veneer.save(model, tmp_path)
    other = fresh("mixed").bfloat16()
    veneer.load(other, tmp_path)
    assert all(p.dtype == torch.bfloat16 for p in veneer.trainable(other))
    assert torch.equal(outputs(other, "mixed"), outputs(model, "mixed"))


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts(transposed, tmp_path):
    model = adapted(Routed(transposed), {"experts.*": LoRA(rank=2, alpha=3), "head": LoRA(rank=3)})
    report = veneer.save(model, tmp_path)
    assert report.format == "peft"
    other = Routed(transposed)
    veneer.load(other, tmp_path)
    assert torch.equal(outputs(other, "mixed"), outputs(model, "mixed"))
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(Routed(transposed), str(tmp_path))
    assert torch.allclose(outputs(theirs, "mixed"), outputs(model, "mixed"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts_of_peft(transposed, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(Routed(transposed), peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["head"], target_parameters=["experts.down", "experts.up"]))
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            if "lora_B" in name:
                param.normal_(0, 0.3)
    theirs.save_pretrained(str(tmp_path))
    model = Routed(transposed)
    veneer.load(model, tmp_path)
    assert torch.allclose(outputs(model, "mixed"), outputs(theirs, "mixed"), rtol=1e-5, atol=1e-6)


#: rules PEFT has no words for → part of the reason
NATIVE = {
    "mixed methods": ({"block.0": DoRA(LoRA()), "block.2": LoRA()}, "use_dora holds for all"),
    "attention": ({"attention.in_proj_weight": LoRA()}, "applies LoRA on the out_proj of nn.MultiheadAttention twice"),
    "part of a module": ({"block.2": LoRA(), "head": Full(), "head.bias": None}, "only a part of its module"),
    "some biases": ({"block.2": LoRA(), "head.bias": Full()}, "neither all of the model's nor just those"),
    "some lora_bias": ({"block.2": LoRA(bias=True), "head": LoRA()}, "lora_bias holds for all"),
    "rows of a head": ({"head": Rows([1])}, "rows only of embeddings and of linear layers without bias"),
}


@pytest.mark.parametrize("case", NATIVE)
def test_what_peft_cannot_say_is_native_and_says_why(case, tmp_path):
    rules, reason = NATIVE[case]
    veneer.save(adapted(fresh("mixed"), {"block.0": LoRA()}), tmp_path)  # to be replaced, in the other format
    model = adapted(fresh("mixed"), rules)
    report = veneer.save(model, tmp_path)
    assert report.format == "native"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["veneer.json", "veneer.safetensors"]
    assert reason in report.reason
    assert "native format, PEFT cannot load it: " in str(report)
    assert reason in str(veneer.info(tmp_path))
    other = fresh("mixed")
    veneer.load(other, tmp_path)
    assert torch.equal(outputs(other, "mixed"), outputs(model, "mixed"))


@pytest.mark.parametrize("method", [LoRA(rank=2), Full(), Rows([1, 2])], ids=["lora", "full", "rows"])
def test_a_tie_that_peft_does_not_know_of(method, tmp_path):
    def tied():
        torch.manual_seed(4)
        model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False))
        model[2].weight = model[0].weight
        return model

    model = adapted(tied(), {"0": method, "1": LoRA(rank=2)})
    report = veneer.save(model, tmp_path)
    assert report.format == "native"
    assert "the model's config does not say so (tie_word_embeddings)" in report.reason
    other = tied()
    veneer.load(other, tmp_path)
    assert torch.equal(outputs(other, "mixed"), outputs(model, "mixed"))
    assert other[2].weight is other[0].weight
    peft = pytest.importorskip("peft")
    if isinstance(method, Rows):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(target_modules=["1"], trainable_token_indices={"0": [1, 2]})
            peft.get_peft_model(tied(), config).save_pretrained(str(tmp_path / "peft"))
        with pytest.raises(VeneerError, match="'0' shares a tied weight here, and PEFT trained its rows alone"):
            veneer.load(tied(), tmp_path / "peft")


def test_convolutions_that_peft_computes_otherwise(tmp_path):
    for options in ({"groups": 2}, {"dilation": 2}, {"padding_mode": "circular", "padding": 1}):
        model = nn.Sequential(nn.Conv1d(4, 4, 3, **options))
        veneer.attach(model, {"0": LoRA(rank=2)})
        report = veneer.save(model, tmp_path)
        assert report.format == "native"
        assert f"a convolution with {next(iter(options))}" in report.reason


def test_dropout_that_differs_is_kept_by_veneer_and_noted(tmp_path):
    rules = {"block.0": LoRA(dropout=0.1), "block.2": LoRA(), "head": LoRA()}
    report = veneer.save(adapted(fresh("mixed"), rules), tmp_path)
    assert "lora_dropout is 0.0 in adapter_config.json" in str(report)
    other = fresh("mixed")
    veneer.load(other, tmp_path)
    assert veneer.adapters(other)["default"].weights["block.0"].dropout == 0.1


def test_several_names_and_a_single_file(tmp_path):
    model = adapted(fresh("mixed"), {"block.*": LoRA(rank=2)}, name="first")
    adapted(model, {"head": LoRA(rank=1)}, name="second")
    veneer.save(model, tmp_path / "1", name="first")
    veneer.save(model, tmp_path / "2", name="second")
    other = fresh("mixed")
    veneer.load(other, tmp_path / "1" / "adapter_model.safetensors", name="first")
    veneer.load(other, str(tmp_path / "2"), name="second")
    for names in (["first"], ["second"], ["first", "second"]):
        veneer.activate(model, names)
        veneer.activate(other, names)
        assert torch.equal(outputs(other, "mixed"), outputs(model, "mixed"))


def test_an_edited_config_is_used(tmp_path):
    model = adapted(fresh("mixed"), {"block.*": LoRA(rank=2, alpha=2)})
    veneer.save(model, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 6}))
    other = fresh("mixed")
    report = veneer.load(other, tmp_path)
    assert "adapter_config.json was edited after the save" in str(report)
    assert veneer.adapters(other)["default"].weights["block.0"].method.scale == 3


def test_no_byte_of_the_base_is_written(tmp_path):
    model = adapted(fresh("llama"), {"*.q_proj": LoRA(rank=2), "*.embed_tokens": LoRA(rank=2)})
    report = veneer.save(model, tmp_path)
    tensors, _ = read_tensors(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == report.parameters == sum(
        p.numel() for p in veneer.trainable(model))
    assert report.bytes == sum(f.stat().st_size for f in tmp_path.iterdir())


def test_attached_on_meta_and_never_run(tmp_path):
    with torch.device("meta"):
        model = fresh("mixed").to("meta")
    veneer.attach(model, {"block.*": DoRA(LoRA(rank=2))})
    model.to_empty(device="cpu")
    base = fresh("mixed")
    model.load_state_dict(base.state_dict(), strict=False)
    veneer.save(model, tmp_path)
    veneer.load(base, tmp_path)
    magnitude = veneer.adapters(base)["default"].weights["block.0"].magnitude
    assert torch.allclose(magnitude, fresh("mixed").block[0].weight.norm(dim=1))


def test_info_of_a_path_and_of_a_model(tmp_path):
    model = adapted(fresh("llama"), {"*.q_proj": LoRA(rank=2, alpha=4), "*.embed_tokens": Rows([1, 2, 3])}, seed=5)
    veneer.save(model, tmp_path)
    text = str(veneer.info(tmp_path))
    for part in ("PEFT format", "3 weights, 352 parameters, 1,408 bytes", "LoRA(rank=2, alpha=4) on 2 weights",
                 "Rows(ids=(1, 2, 3)) on 1 weights", "class LlamaForCausalLM", "fingerprint ", "veneer 0.", "torch 2.",
                 "seed 5"):
        assert part in text
    text = str(veneer.info(model))
    assert "default: on a LlamaForCausalLM, live" in text
    assert "3 weights, 352 parameters, 1,408 bytes" in text
    assert str(veneer.info(nn.Linear(2, 2))) == "no adapters"


def test_info_of_what_peft_wrote(tmp_path):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(fresh("llama"), peft.LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    text = str(veneer.info(tmp_path))
    assert "PEFT format" in text
    assert "LoRA with 3 rows in A on 2 weights" in text
    assert f"peft {peft.__version__}" in text


def test_files_need_no_optional_library(tmp_path):
    """save, load and info with only torch and safetensors importable."""
    script = (
        "import sys\n"
        "for name in ('numpy', 'transformers', 'peft', 'huggingface_hub', 'accelerate'):\n"
        "    sys.modules[name] = None\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "import torch, veneer\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4)).bfloat16()\n"
        "veneer.attach(model, {'0': veneer.LoRA(rank=2)})\n"
        "veneer.save(model, sys.argv[1]); veneer.detach(model); print(veneer.load(model, sys.argv[1]))\n"
        "print(veneer.info(sys.argv[1]))\n")
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "loaded 1 weights, 16 parameters as 'default'" in run.stdout


def test_the_library_reads_what_the_writer_writes(tmp_path):
    from safetensors.torch import load_file

    tensors = {"a": torch.randn(3, 4).mT, "b": torch.tensor(2.5).bfloat16(), "empty": torch.empty(0, 3),
               "c": torch.arange(5), "d": torch.randn(7, dtype=torch.float64), "e": torch.tensor([True, False]),
               "f": torch.randn(3).half(), "strided": torch.randn(6)[::2]}
    with open(tmp_path / "x.safetensors", "wb") as file:
        write_tensors(file, tensors, {"note": "µ"})
    back = load_file(tmp_path / "x.safetensors")
    assert set(back) == set(tensors)
    assert all(torch.equal(back[k], t) and back[k].dtype == t.dtype for k, t in tensors.items())
    assert read_tensors(tmp_path / "x.safetensors")[1] == {"note": "µ"}
    assert content_hash(back) == content_hash(tensors)
    back["c"][2] += 1
    assert content_hash(back) != content_hash(tensors)
