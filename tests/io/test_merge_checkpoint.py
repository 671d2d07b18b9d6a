"""merge_checkpoint: the bits of a merge in memory, with one weight in memory, whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from io_models import Mixed, adapted, outputs
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from veneer import AdaLoRA, DoRA, Full, LoHa, LoKr, LoRA, RandLoRA, Rows, VBLoRA, VeRA
from veneer.io import structure
from veneer.io.checkpoint import Checkpoint, parse_size
from veneer.io.tensors import read_tensors
from veneer.method import VeneerError

transformers = pytest.importorskip("transformers")


def make(kind: str):
    torch.manual_seed(5)
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=32)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32,
                                         bos_token_id=0, eos_token_id=1)
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=4)).eval()
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=kind == "tied", attention_bias=True)
    model = transformers.LlamaForCausalLM(config)
    return (model.model if kind == "body" else model).eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory):
    """The folder of a checkpoint by kind and dtype, made once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def folder(kind: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        if (kind, dtype) not in made:
            made[kind, dtype] = tmp_path_factory.mktemp(kind)
            size = "8KB" if dtype == torch.bfloat16 else "16KB"
            make(kind).to(dtype).save_pretrained(made[kind, dtype], max_shard_size=size)
        return made[kind, dtype]

    return folder


def loaded(folder: Path, dtype="auto"):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def train(folder: Path, rules, path: Path, dtype="auto") -> Path:
    """An adapter with every number moved, saved."""
    veneer.save(adapted(loaded(folder, dtype), rules), path)
    return path


def in_memory(base: Path, adapter: Path, dtype="auto", strict: bool = True):
    model = loaded(base, dtype)
    veneer.load(model, adapter, strict=strict)
    veneer.merge(model, keep=False)
    return veneer.detach(model)


def assert_same_bits(got: nn.Module, want: nn.Module) -> None:
    a, b = got.state_dict(), want.state_dict()
    assert a.keys() == b.keys()
    assert [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])] == []


ALL = "*_proj"
CELLS = {
    "lora": ("llama", LoRA(rank=4)), "bias": ("llama", {"*q_proj": LoRA(rank=4, bias=True)}),
    "dora": ("llama", DoRA(LoRA(rank=4))), "loha": ("llama", LoHa(rank=2)), "lokr": ("llama", LoKr(rank=4)),
    "vera": ("llama", {ALL: VeRA(rank=8)}), "randlora": ("llama", {ALL: RandLoRA(rank=8)}),
    "vblora": ("llama", {ALL: VBLoRA(rank=2, vector_length=16, num_vectors=8)}), "adalora": ("llama", AdaLoRA()),
    "full": ("llama", {"*.up_proj": Full(), "*.q_proj": Full(), "model.norm": Full(), "lm_head": LoRA(rank=2)}),
    "rows": ("llama", {"model.embed_tokens": Rows([3, 5]), "*.v_proj": LoRA()}),
    "tied": ("tied", {"model.embed_tokens": LoRA(rank=4), ALL: LoRA(rank=2)}),
    "tied dora": ("tied", {"model.embed_tokens": DoRA(LoRA(rank=4))}),
    "conv1d": ("gpt2", LoRA(rank=4)), "conv1d dora": ("gpt2", DoRA(LoRA(rank=4, bias=True))),
    "experts": ("mixtral", {"*.experts.gate_up_proj": LoRA(rank=2), "*.experts.down_proj": Full(), ALL: LoRA()}),
    "pissa": ("llama", {ALL: LoRA(rank=4, init="pissa")}),
    "pissa base": ("llama", {ALL: LoRA(rank=4, init="pissa", residual="base")}),
    "loftq": ("llama", {ALL: LoRA(rank=4, init="loftq")}),
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.filterwarnings("ignore::veneer.method.VeneerWarning")
def test_the_bits_of_a_merge_in_memory(cell: str, bases, tmp_path: Path) -> None:
    kind, rules = CELLS[cell]
    base = bases(kind)
    assert len(list(base.glob("*.safetensors"))) >= 6
    adapter = train(base, rules, tmp_path / "adapter")
    report = veneer.merge_checkpoint(base, adapter, tmp_path / "out")
    want = in_memory(base, adapter)
    got = loaded(tmp_path / "out")
    assert_same_bits(got, want)
    changed = [k for k, v in got.state_dict().items() if not torch.equal(v, loaded(base).state_dict()[k])]
    tied = kind in ("tied", "gpt2") and "lm_head.weight" in changed
    assert report.weights == len(changed) - tied
    before, after = ((folder / "model.safetensors.index.json").read_bytes() for folder in (base, tmp_path / "out"))
    assert json.loads(before)["weight_map"] == json.loads(after)["weight_map"]
    assert json.loads(before)["metadata"] == json.loads(after)["metadata"]
    assert str(report).startswith(f"merged {report.weights} weights into {tmp_path / 'out'}: {len(report.files)} files")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "float16"])
def test_another_dtype(stored: torch.dtype, dtype, bases, tmp_path: Path) -> None:
    base = bases("llama", stored)
    kind = torch.float16 if dtype == "float16" else dtype
    adapter = train(base, {ALL: LoRA(rank=4)}, tmp_path / "adapter", kind)
    report = veneer.merge_checkpoint(base, adapter, tmp_path / "out", dtype=dtype)
    got = loaded(tmp_path / "out")
    assert got.dtype == kind
    assert_same_bits(got, in_memory(base, adapter, kind))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.bytes == sum(p.nbytes for p in got.parameters())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")


def test_16_bits_cost_little(bases, tmp_path: Path) -> None:
    base = bases("llama", torch.bfloat16)
    adapter = train(base, LoRA(rank=4), tmp_path / "adapter")
    unmerged = loaded(base)
    veneer.load(unmerged, adapter)
    veneer.merge_checkpoint(base, adapter, tmp_path / "out")
    p, q = (outputs(model, "llama").double().log_softmax(-1) for model in (unmerged, loaded(tmp_path / "out")))
    plain = outputs(loaded(base), "llama").double().log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 1e-3 < float((p.exp() * (p - plain)).sum(-1).mean())


def test_a_body_under_a_model_with_a_head(bases, tmp_path: Path) -> None:
    """Names in the files without the prefix that the model has."""
    body = bases("body")
    folder = tmp_path / "base"
    shutil.copytree(body, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    keys = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert "layers.0.self_attn.q_proj.weight" in keys
    adapter = train(folder, {ALL: LoRA(rank=2)}, tmp_path / "adapter")
    veneer.merge_checkpoint(folder, adapter, tmp_path / "out")
    # The head is in no file, and drawn anew by each loading.
    assert_same_bits(loaded(tmp_path / "out").model, in_memory(folder, adapter, strict=False).model)


# -- what is in the folder ------------------------------------------------------------------------------
def test_companions_are_copied_and_other_weights_not(bases, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("llama"), base)
    kept = ["tokenizer.json", "LICENSE", "chat_template.jinja", "1_Pooling/config.json"]
    left = ["pytorch_model.bin", "onnx/model.onnx", "adapter_config.json", "adapter_model.safetensors", ".git/config",
            "pytorch_model.bin.index.json", "original/consolidated.00.pth"]
    for name in kept + left:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(f"{name}!")
    adapter = train(bases("llama"), {"*q_proj": LoRA(rank=2)}, tmp_path / "adapter")
    said: list[str] = []
    report = veneer.merge_checkpoint(base, adapter, tmp_path / "out", progress=said.append)
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {*kept, *report.files, "config.json", "generation_config.json", "model.safetensors.index.json"}
    assert all((tmp_path / "out" / name).read_text() == f"{name}!" for name in kept)
    assert said[0] == f"{report.files[0]} is written (1 of {len(report.files)})"
    assert len(said) == len(report.files) >= 6
    for file in report.files:
        old, meta = read_tensors(base / file)
        new, same = read_tensors(tmp_path / "out" / file)
        assert meta == same
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) != ("q_proj.weight" in key) for key in old)


def test_shards_of_another_size_and_a_single_file(bases, tmp_path: Path) -> None:
    base = bases("llama")
    adapter = train(base, LoRA(rank=2), tmp_path / "adapter")
    want = in_memory(base, adapter)
    report = veneer.merge_checkpoint(base, adapter, tmp_path / "small", max_shard_size=5000)
    for file in report.files:
        assert sum(t.nbytes for t in load_file(tmp_path / "small" / file).values()) <= 5000
    assert len(report.files) > 8
    assert_same_bits(loaded(tmp_path / "small"), want)
    one = veneer.merge_checkpoint(base, adapter, tmp_path / "one", max_shard_size="1GB")
    assert one.files == ("model.safetensors",)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists() or loaded(tmp_path / "one")
    assert_same_bits(loaded(tmp_path / "one"), want)
    (tmp_path / "single").mkdir()
    shutil.copy(base / "config.json", tmp_path / "single")
    save_file({k: v for f in base.glob("*.safetensors") for k, v in load_file(f).items()},
              tmp_path / "single" / "model.safetensors", {"format": "pt"})
    again = veneer.merge_checkpoint(tmp_path / "single", adapter, tmp_path / "again")
    assert again.files == ("model.safetensors",)
    assert_same_bits(loaded(tmp_path / "again"), want)


def plain_base(folder: Path, model: nn.Module, files: int = 3) -> Path:
    """A checkpoint of a model that transformers does not know."""
    folder.mkdir()
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    where = {key: names[i * files // len(state)] for i, key in enumerate(state)}
    for name in names:
        save_file({key: state[key] for key in state if where[key] == name}, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def on_meta(kind: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return kind()


RULES = {"embed": LoRA(rank=2), "conv1": LoRA(rank=2), "conv2": LoKr(rank=2), "block.*": LoRA(rank=2), "norm": Full(),
         "attention.in_proj_weight": LoRA(rank=2), "attention.out_proj": LoRA(rank=2), "head.bias": Full()}


@pytest.mark.filterwarnings("ignore::veneer.method.VeneerWarning")
def test_a_model_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = Mixed().eval()
    base = plain_base(tmp_path / "base", model)
    adapted(model, RULES)
    veneer.save(model, tmp_path / "adapter")
    with pytest.raises(VeneerError, match=r"there is no config\.json in .* give its structure: model="):
        veneer.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(VeneerError, match="model is the structure alone, without adapters and with its parameters on"):
        veneer.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", model=Mixed())
    veneer.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", model=on_meta(Mixed))
    again = Mixed().eval()
    again.load_state_dict({k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()})
    veneer.merge(model, keep=False)
    assert_same_bits(again, veneer.detach(model))


# -- memory ---------------------------------------------------------------------------------------------
def test_one_weight_at_a_time(bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = bases("llama", torch.float32)
    adapter = train(base, LoRA(rank=2), tmp_path / "adapter")
    alive: list[weakref.ref] = []
    most = [0]

    def watched(real):
        def call(*args):
            found = real(*args)
            alive.append(weakref.ref(found))
            most[0] = max(most[0], sum(ref() is not None for ref in alive))
            return found

        return call

    monkeypatch.setattr(Checkpoint, "read", watched(Checkpoint.read))
    monkeypatch.setattr(structure, "merged_value", watched(structure.merged_value))
    veneer.merge_checkpoint(base, adapter, tmp_path / "out")
    assert len(alive) > 30
    assert most[0] <= 2, "a weight and what it becomes"


_CHILD = """
import os, sys
import torch, veneer
from torch import nn
torch.set_num_threads(1)
def model(layers):
    return nn.ModuleDict({f"layer{i}": nn.Linear(512, 512, bias=False) for i in range(layers)})
with torch.device("meta"):
    whole, small = model(192), model(1)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
root = sys.argv[1]
before = 0
if sys.argv[2:] == ["measure"]:
    veneer.merge_checkpoint(root + "/small", root + "/small_adapter", root + "/small_out", model=small)
    before = peak()
def progress(text):
    if "(4 of" in text and sys.argv[2:] == ["kill"]:
        os._exit(9)
veneer.merge_checkpoint(root + "/base", root + "/adapter", root + "/out", model=whole, progress=progress)
print(peak() - before)
"""


def child(tmp_path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(_CHILD), str(tmp_path), *args], capture_output=True,
                          text=True)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A checkpoint of 8 shards, each of 24 weights of 1 MiB in fp32, and one of a single weight; bytes of a shard."""
    root = tmp_path_factory.mktemp("large")
    for name, layers, adapter in (("base", 192, "adapter"), ("small", 1, "small_adapter")):
        torch.manual_seed(0)
        model = linears(layers)
        plain_base(root / name, model, min(layers, 8))
        veneer.save(adapted(model, {"layer*": LoRA(rank=2)}), root / adapter)
    return root, 24 * 2**20


def linears(layers: int) -> nn.Module:
    return nn.ModuleDict({f"layer{i}": nn.Linear(512, 512, bias=False) for i in range(layers)})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_number_of_shards(large: tuple[Path, int]) -> None:
    root, shard = large
    done = child(root, "measure")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * shard, f"{int(done.stdout) / shard:.1f} shards more than for one weight"
    shutil.rmtree(root / "out")


# -- whole or not at all --------------------------------------------------------------------------------
def test_a_killed_run_leaves_nothing_under_the_name(large: tuple[Path, int]) -> None:
    root, _ = large
    done = child(root, "kill")
    assert done.returncode == 9, done.stderr
    assert not (root / "out").exists()
    left = [p for p in root.iterdir() if p.name.startswith(".out.veneer-tmp-")]
    assert len(left) == 1
    os.utime(left[0], (0, 0))  # of another day
    with torch.device("meta"):
        model = linears(192)
    veneer.merge_checkpoint(root / "base", root / "adapter", root / "out", model=model)
    assert [p.name for p in root.iterdir() if p.name.startswith(".")] == []
    shutil.rmtree(root / "out")


def test_a_failure_leaves_what_was_there(bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = bases("llama")
    adapter = train(base, LoRA(rank=2), tmp_path / "adapter")
    out = tmp_path / "out"
    veneer.merge_checkpoint(base, adapter, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(VeneerError, match="is there already and is not empty; overwrite=True replaces it"):
        veneer.merge_checkpoint(base, adapter, out)
    calls = []
    real = Checkpoint.read

    def read(self, key):
        calls.append(key)
        if len(calls) == 20:
            raise OSError(28, "No space left on device")
        return real(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read", read)
        with pytest.raises(VeneerError, match=r"could not write .*out: No space left on device\. What was"):
            veneer.merge_checkpoint(base, adapter, out, overwrite=True, dtype="float32")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "out"]
    (out / "stale.safetensors").write_bytes(b"")
    veneer.merge_checkpoint(base, adapter, out, overwrite=True, dtype="float32")
    assert sorted(p.name for p in out.iterdir()) == sorted(before)
    assert loaded(out).dtype == torch.float32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "out"]


def test_what_is_no_models_folder_is_not_replaced(bases, tmp_path: Path) -> None:
    base = bases("llama")
    adapter = train(base, LoRA(rank=2), tmp_path / "adapter")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    for out, text in ((tmp_path / "home", "does not look like a model's folder"), (base, "holds the base, which is"),
                      (tmp_path, "does not look like"), (adapter, "holds the adapter, which is read from there")):
        with pytest.raises(VeneerError, match=text):
            veneer.merge_checkpoint(base, adapter, out, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(VeneerError, match="is there already and is a file"):
        veneer.merge_checkpoint(base, adapter, tmp_path / "file")
    assert (tmp_path / "home" / "letters.txt").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    veneer.merge_checkpoint(base, adapter, tmp_path / "empty")
    assert loaded(tmp_path / "empty")


# -- errors ---------------------------------------------------------------------------------------------
@pytest.fixture
def broken(bases, tmp_path: Path):
    """A copy of the untied checkpoint to break, and an adapter for it."""
    shutil.copytree(bases("llama"), tmp_path / "base")
    return tmp_path / "base", train(bases("llama"), {ALL: LoRA(rank=2)}, tmp_path / "adapter")


def refused(base: Path, adapter: Path, text: str, **options) -> str:
    out = base.parent / "out"
    with pytest.raises(VeneerError, match=text) as caught:
        veneer.merge_checkpoint(base, adapter, out, **options)
    assert not out.exists()
    assert list(base.parent.glob(".*veneer-tmp*")) == []
    return str(caught.value)


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def rewrite(folder: Path, key: str, value: torch.Tensor | None) -> None:
    index = folder / "model.safetensors.index.json"
    file = folder / json.loads(index.read_text())["weight_map"][key]
    tensors = load_file(file)
    if value is None:
        del tensors[key]
        edit(index, lambda data: data["weight_map"].pop(key))
    else:
        tensors[key] = value
    save_file(tensors, file, {"format": "pt"})


def test_folders_that_are_not_whole(broken) -> None:
    base, adapter = broken
    index, first = base / "model.safetensors.index.json", sorted(base.glob("*.safetensors"))[0]
    refused(base / "nowhere", adapter, "there is no folder .*nowhere.*nothing is downloaded")
    whole = first.read_bytes()
    first.write_bytes(whole[:-100])
    refused(base, adapter, re.escape(f"{first} ({len(whole) - 100:,} bytes) is no complete safetensors file"))
    first.unlink()
    refused(base, adapter, f"{first.name}, which .* names, is not there: the folder is not whole")
    first.write_bytes(whole)
    text = index.read_text()
    edit(index, lambda data: data["weight_map"].update({"more.weight": first.name}))
    refused(base, adapter, f"says that 'more.weight' is in {first.name}, and it is not")
    index.write_text("{")
    refused(base, adapter, "is no index of a checkpoint")
    edit_map = json.loads(text)
    index.write_text(json.dumps({**edit_map, "weight_map": {"a": "../b"}}))
    refused(base, adapter, "weight_map does not lead from tensors to files beside it")
    index.unlink()
    shutil.copy(first, base / "copy.safetensors")
    refused(base, adapter, r"is in copy\.safetensors and in .* no model\.safetensors\.index\.json says which counts")
    for file in base.glob("*.safetensors"):
        file.unlink()
    (base / "pytorch_model.bin").write_bytes(b"")
    refused(base, adapter, r"no safetensors file of a model in .*; it has: config\.json, .*pytorch_model\.bin")


def test_a_quantised_base(broken) -> None:
    base, adapter = broken
    edit(base / "config.json", lambda data: data.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    refused(base, adapter, r"the weights in .* are quantised \(gptq\).*Give the 16-bit checkpoint")


def test_another_base(broken) -> None:
    base, adapter = broken
    key = "model.layers.1.mlp.up_proj.weight"
    rewrite(base, key, torch.randn(48, 32).bfloat16())
    refused(base, adapter, r"another base model: base weight 'model\.layers\.1\.mlp\.up_proj' has other values than "
                           r"the one this adapter was trained on\. Nothing was written; strict=False merges all the")
    report = veneer.merge_checkpoint(base, adapter, base.parent / "out", strict=False)
    assert len(report.problems) == 1
    assert "problem: base weight 'model.layers.1.mlp.up_proj' has other values" in str(report)
    assert_same_bits(loaded(base.parent / "out"), in_memory(base, adapter, strict=False))


def test_a_start_from_other_numbers(bases, tmp_path: Path) -> None:
    """A start that must be run again to merge, and was run on a quantised base."""
    base = tmp_path / "base"
    shutil.copytree(bases("llama"), base)
    model = loaded(base)
    veneer.quantize(model, "nf4")
    veneer.save(adapted(model, {"*.q_proj": LoRA(rank=2, init="loftq")}), tmp_path / "adapter")
    refused(base, tmp_path / "adapter", "is held as bfloat16 here and was held as nf4 .read as bfloat16. when")


def test_files_that_do_not_fit_the_config(broken) -> None:
    base, adapter = broken
    edit(base / "config.json", lambda data: data.update(vocab_size=50))
    refused(base, adapter, r"does not fit its own config \(2 tensors\)\n  'lm_head\.weight' is \(40, 32\) in the files "
                           r"and \(50, 32\) by the model's config")
    edit(base / "config.json", lambda data: data.update(vocab_size=40, model_type="lama"))
    refused(base, adapter, "transformers cannot build the model of .*config.json: ")
    (base / "config.json").write_text("[")
    refused(base, adapter, r"config\.json is no JSON file")


def test_an_adapter_that_does_not_fit(broken, bases, tmp_path: Path) -> None:
    base, adapter = broken
    text = refused(bases("gpt2"), adapter, r"does not fit the model in .* \(\d+ problems\); nothing was written")
    assert "no module 'model.layers.1.mlp.up_proj' here; did you mean 'transformer.h.1.mlp.c_proj'?" in text
    refused(base, tmp_path / "no adapter", "there is nothing at .*no adapter")
    rewrite(base, "model.layers.0.mlp.up_proj.weight", None)
    refused(base, adapter, r"1 adapted weights cannot be merged in the files of .*\n  "
                           r"'model\.layers\.0\.mlp\.up_proj\.weight' is not in the files; did you mean 'model\.")


def test_a_bias_that_would_be_lost(bases, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("llama"), base)
    adapter = train(base, {"*.up_proj": LoRA(rank=2, bias=True)}, tmp_path / "adapter")
    refused(base, adapter, r"adds a bias to 'model\.layers\.0\.mlp\.up_proj', and the model has none there, so that it "
                           "would be lost on loading")


def test_a_tie_that_the_files_do_not_have(bases, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("tied"), base)
    adapter = train(base, {"model.embed_tokens": LoRA(rank=2)}, tmp_path / "adapter")
    index = base / "model.safetensors.index.json"
    table = load_file(base / json.loads(index.read_text())["weight_map"]["model.embed_tokens.weight"])
    save_file({"lm_head.weight": table["model.embed_tokens.weight"]}, base / "head.safetensors", {"format": "pt"})
    edit(index, lambda data: data["weight_map"].update({"lm_head.weight": "head.safetensors"}))
    veneer.merge_checkpoint(base, adapter, tmp_path / "both")
    head = load_file(tmp_path / "both" / "head.safetensors")["lm_head.weight"]
    assert_same_bits(loaded(tmp_path / "both"), in_memory(base, adapter))
    assert torch.equal(head, loaded(tmp_path / "both").model.embed_tokens.weight)
    save_file({"lm_head.weight": head}, base / "head.safetensors", {"format": "pt"})
    refused(base, adapter, r"'model\.embed_tokens\.weight' and 'lm_head\.weight' are one weight by the config "
                           r"\(tie_word_embeddings\), and the files have different values for them")


def test_a_full_disk_and_bad_options(broken, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = broken
    refused(base, adapter, "dtype is what floating numbers are cast to, got torch.int8", dtype=torch.int8)
    refused(base, adapter, "unknown dtype 'bf16'", dtype="bf16")
    for size in ("5 apples", 0, -1, True, "GB", "5EB"):
        refused(base, adapter, "a size is a number of bytes, or one with a unit such as '5GB'", max_shard_size=size)
    usage = shutil.disk_usage(base)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    refused(base, adapter, r"the merged weights take [\d,]+ bytes, and 10 are free at ")


def test_sizes() -> None:
    assert [parse_size(s, "x") for s in (7, "7", "5KB", "1.5 MB", "2gib", None)] == [7, 7, 5000, 1500000, 2**31, None]


def test_a_file_that_carries_base_weights(bases, tmp_path: Path) -> None:
    """PEFT puts a resized embedding whole into its file: rows of it that differ are merged too."""
    base = tmp_path / "base"
    shutil.copytree(bases("llama"), base)
    adapter = train(base, {"*q_proj": LoRA(rank=2)}, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    table = loaded(base).model.embed_tokens.weight.detach().clone()
    table[[3, 7]] += 1
    tensors["base_model.model.model.embed_tokens.weight"] = table
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    (adapter / "veneer.json").unlink()
    report = veneer.merge_checkpoint(base, adapter, tmp_path / "out")
    assert any("2 rows of its own" in note for note in report.notes)
    assert torch.equal(loaded(tmp_path / "out").model.embed_tokens.weight, table)
    assert_same_bits(loaded(tmp_path / "out"), in_memory(base, adapter))


def test_without_transformers(broken, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = broken
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(base, adapter, r"transformers, which is not installed: pip install 'veneer\[train\]', or give model=")


def test_a_conversion_without_a_way_back(bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("mixtral"), base)
    adapter = train(base, {"*.experts.down_proj": LoRA(rank=2)}, tmp_path / "adapter")
    loading = transformers.core_model_loading

    def none(self):
        raise NotImplementedError("one way only")

    with monkeypatch.context() as patch:
        patch.setattr(loading.WeightConverter, "reverse_transform", none)
        text = refused(base, adapter, "2 adapted weights cannot be merged in the files")
        assert "experts.down_proj': transformers makes it of 4 tensors and knows no way back (one way only)" in text
    with monkeypatch.context() as patch:
        patch.setattr(loading, "revert_weight_conversion", lambda model, state: state)
        refused(base, adapter, r"transformers makes other tensors of 'model\.layers\.0\.mlp\.experts\.down_proj' than")
    with monkeypatch.context() as patch:
        patch.delattr(loading, "revert_weight_conversion")
        refused(base, adapter, "this version of transformers does not say how it names weights in files; update it")
