"""What does not fit or is damaged is refused with a message that says what, and the model is as before."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from io_models import adapted, fresh, llama, mixed, outputs

import veneer
from veneer import DoRA, Full, LoRA, Rows
from veneer.io.tensors import read_tensors, write_tensors
from veneer.method import VeneerError

RULES = {"*.q_proj": LoRA(rank=2, alpha=3), "*.v_proj": LoRA(rank=2, alpha=3)}
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "adapter"
    veneer.save(adapted(fresh("llama"), RULES), path)
    return path


def bare(path, change=lambda tensors: None, **config):
    """The same adapter as another tool writes it: no manifest; with tensors changed and config keys set."""
    tensors = {k: t.clone() for k, t in read_tensors(path / "adapter_model.safetensors")[0].items()}
    change(tensors)
    with open(path / "adapter_model.safetensors", "wb") as file:
        write_tensors(file, tensors, {"format": "pt"})
    (path / "veneer.json").unlink(missing_ok=True)
    now = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**now, **config}))
    return path


def refused(path, base=None, **options) -> str:
    """The message of a load that must fail, after checking that it has left no trace."""
    model = fresh("llama") if base is None else base
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(VeneerError) as error:
        veneer.load(model, path, **options)
    assert veneer.adapters(model) == {}
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert [p.requires_grad for p in model.parameters()] == grads
    return str(error.value)


# -- damaged ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [0, 5, 300, -64, -1])
def test_truncated_file(saved, size):
    file = saved / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    message = refused(saved)
    assert f"{file}: not a complete safetensors file" in message
    assert f"It has {len(whole[:size]):,} bytes" in message
    assert "Nothing was loaded; copy or save it again" in message
    if size < 0:
        assert f"its header announces {len(whole):,}" in message


def test_a_flipped_bit(saved):
    file = saved / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(bytes(data))
    assert "is damaged: its tensors are not the ones that were saved (SHA-256 differs)" in refused(saved)


def test_damaged_json(saved):
    bare(saved)
    (saved / "adapter_config.json").write_text('{"r": 8,')
    assert "adapter_config.json is not JSON" in refused(saved)
    (saved / "adapter_config.json").write_bytes(b"\xff\xfe")
    assert "adapter_config.json is not text" in refused(saved)
    (saved / "adapter_config.json").unlink()
    assert "adapter_model.safetensors has no adapter_config.json beside it" in refused(saved)


def test_native_file_with_another_manifest(tmp_path):
    for name, rank in (("a", 2), ("b", 3)):
        veneer.save(adapted(fresh("mixed"), {"head": LoRA(rank=rank), "block.0": DoRA(LoRA(rank=1))}), tmp_path / name)
    tensors, _ = read_tensors(tmp_path / "a" / "veneer.safetensors")
    with open(tmp_path / "b" / "veneer.safetensors", "wb") as file:
        write_tensors(file, tensors, {})
    assert "do not belong together (SHA-256 differs)" in refused(tmp_path / "b", fresh("mixed"))
    shutil.copy(tmp_path / "a" / "veneer.json", tmp_path / "b")
    assert veneer.load(fresh("mixed"), tmp_path / "b").problems == ()


def test_nothing_there(tmp_path):
    assert "there is nothing at" in refused(tmp_path / "no" / "such")
    assert "never download" in refused("someone/some-adapter")
    (tmp_path / "model.safetensors").write_bytes(b"")
    message = refused(tmp_path)
    assert "expected adapter_model.safetensors (or veneer.safetensors); it has: model.safetensors" in message


def test_newer_format(saved):
    tensors, meta = read_tensors(saved / "adapter_model.safetensors")
    tensors = {k: t.clone() for k, t in tensors.items()}
    meta["veneer.manifest"] = meta["veneer.manifest"].replace('"format_version": 1', '"format_version": 2')
    with open(saved / "adapter_model.safetensors", "wb") as file:
        write_tensors(file, tensors, meta)
    assert "is of format version 2; this Veneer reads up to 1: upgrade veneer" in refused(saved)


def test_a_damaged_adapter_can_be_replaced(saved):
    tensors, meta = read_tensors(saved / "adapter_model.safetensors")
    tensors = {k: t.clone() for k, t in tensors.items()}
    meta["veneer.manifest"] = meta["veneer.manifest"].replace('"method": "lora"', '"method": "some method of mine"')
    with open(saved / "adapter_model.safetensors", "wb") as file:
        write_tensors(file, tensors, meta)
    assert "unknown method 'some method of mine'" in refused(saved)
    (saved / "adapter_config.json").write_bytes(b"\xff\xfe")
    veneer.save(adapted(fresh("llama"), RULES), saved)
    assert veneer.load(fresh("llama"), saved).problems == ()


# -- another base -------------------------------------------------------------------------------------------
def test_base_of_other_shapes(saved):
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=48, intermediate_size=48, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2, attention_bias=True))
    message = refused(saved, other)
    assert "another base model: " in message
    assert "is (40, 48) here and was (40, 32)" in message
    assert f"wrong shape: '{KEY}' is (2, 32) as A of 'model.layers.0.self_attn.q_proj', which needs (2, 48)" in message


def test_base_of_other_values(saved):
    other = fresh("llama")
    torch.nn.init.normal_(other.model.layers[1].mlp.up_proj.weight)
    message = refused(saved, other)
    assert "another base model: 1 of 29 base weights differ" in message
    assert "'model.layers.1.mlp.up_proj' has other values than the one this adapter was trained on" in message
    report = veneer.load(other, saved, strict=False)
    assert len(report.problems) == 1
    assert report.weights == 4


def test_another_architecture(saved):
    message = refused(saved, fresh("gpt2"))
    assert "another base model" in message
    assert f"unexpected: '{KEY}': no module 'model.layers.0.self_attn.q_proj' here" in message
    with pytest.raises(VeneerError, match=r"nothing in .* fits this model"):
        veneer.load(fresh("gpt2"), saved, strict=False)


def test_the_same_base_in_another_dtype_is_the_same(tmp_path, saved):
    assert veneer.load(fresh("llama").bfloat16(), saved).problems == ()
    assert veneer.load(fresh("llama").half(), saved).problems == ()
    half = adapted(fresh("llama").bfloat16(), RULES)
    veneer.save(half, tmp_path / "half")
    assert veneer.load(fresh("llama").bfloat16().float(), tmp_path / "half").problems == ()
    assert veneer.load(fresh("llama"), tmp_path / "half").problems == ()
    assert veneer.load(fresh("llama").half(), tmp_path / "half").problems == ()
    other = fresh("llama").half()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.02)
    assert "'lm_head' has other values" in refused(tmp_path / "half", other)


def test_a_weight_that_is_trained_whole_may_differ(tmp_path):
    veneer.save(adapted(fresh("mixed"), {"head": Full(), "embed": Rows([3, 5]), "block.*": LoRA(rank=1)}), tmp_path)
    other = fresh("mixed")
    with torch.no_grad():
        torch.nn.init.normal_(other.head.weight)
        other.embed.weight[[3, 5]] = 0
    assert veneer.load(other, tmp_path).problems == ()


def test_the_fingerprint_is_of_the_unmerged_base(tmp_path):
    model = adapted(fresh("llama"), RULES)
    want = outputs(model, "llama")
    veneer.merge(model)
    veneer.save(model, tmp_path)
    other = fresh("llama")
    assert veneer.load(other, tmp_path).problems == ()
    assert torch.equal(outputs(other, "llama"), want)


# -- tensors and config -------------------------------------------------------------------------------------
def test_missing_and_unexpected_keys(saved):
    def change(tensors):
        tensors[KEY.replace("q_proj", "q_porj")] = tensors.pop(KEY)
        del tensors[KEY.replace("layers.0", "layers.1").replace("lora_A", "lora_B")]

    message = refused(bare(saved, change))
    assert f"missing: A of 'model.layers.0.self_attn.q_proj' (no '{KEY}' in the file)" in message
    assert "missing: B of 'model.layers.1.self_attn.q_proj' (no 'base_model.model.model.layers.1" in message
    assert "no module 'model.layers.0.self_attn.q_porj' here; did you mean " \
        "'model.layers.0.self_attn.q_proj'?" in message
    model = fresh("llama")
    report = veneer.load(model, saved, strict=False)
    assert len(report.problems) == 3
    assert report.weights == 2
    assert set(veneer.adapters(model)["default"].weights) == {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}


def test_a_whole_module_missing(saved):
    def change(tensors):
        for letter in "AB":
            del tensors[KEY.replace("lora_A", f"lora_{letter}")]

    assert f"missing: target module 'model.layers.0.self_attn.q_proj' has no '{KEY}' in the file" in refused(
        bare(saved, change))


def test_another_rank_than_the_config_says(saved):
    assert f"wrong shape: '{KEY}' is (2, 32) as A of 'model.layers.0.self_attn.q_proj', which needs (5, 32)" in refused(
        bare(saved, r=5))


@pytest.mark.parametrize(("key", "value", "says"), [
    ("rank_pattern", {"q_proj(": 4}, "rank_pattern: 'q_proj(' is no regular expression"),
    ("use_qalora", True, "use_qalora=True is not supported: it pools the input of A"),
    ("layer_replication", [[0, 2]], "it repeats layers of the base"),
    ("alora_invocation_tokens", [1, 2], "the adapter is live only after certain tokens"),
    ("use_rsloar", True, "unknown key 'use_rsloar' (= True); did you mean 'use_rslora'?"),
    ("init_lora_weights", "pissa_niter_4", "init_lora_weights='pissa_niter_4' changed the base weights"),
    ("init_lora_weights", "lora_ga", "path_initial_model_for_weight_conversion"),
    ("peft_type", "BOFT", "peft_type is 'BOFT'. Veneer reads LORA, LOHA, LOKR"),
    ("bias", "some", "bias='some'; possible: none, all, lora_only"),
])
def test_config_keys_that_would_change_the_result(saved, key, value, says):
    assert says in refused(bare(saved, **{key: value}))


def test_config_keys_without_influence(saved):
    harmless = {"something_new": None, "other_new": False, "third": [], "loftq_config": {}, "megatron_core": "x",
                "runtime_config": {"ephemeral_gpu_offload": True}, "revision": "main", "init_lora_weights": "eva"}
    assert veneer.load(fresh("llama"), bare(saved, **harmless)).problems == ()


def test_base_weights_that_a_file_carries(saved):
    def same(tensors):
        tensors["base_model.model.model.embed_tokens.base_layer.weight"] = fresh("llama").model.embed_tokens.weight.data

    def other(tensors):
        tensors["base_model.model.lm_head.weight"] = torch.zeros(41, 32)

    assert veneer.load(fresh("llama"), bare(saved, same)).problems == ()
    assert "the file carries base weight 'lm_head.weight' (41, 32), and this model's (40, 32) is not the same" \
        in refused(bare(saved, other))


def test_a_resized_vocabulary_in_a_file_of_peft(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    fresh("llama").save_pretrained(tmp_path / "base")
    grown = []
    for seed in (1, 2):  # the new rows are random on each side
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        torch.manual_seed(seed)
        model.resize_token_embeddings(44)
        grown.append(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(grown[0], peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
        theirs.save_pretrained(str(tmp_path / "adapter"))
    ids = torch.arange(44).reshape(4, 11)
    report = veneer.load(grown[1], tmp_path / "adapter")
    assert "with 4 rows of its own (a resized vocabulary)" in str(report)
    with torch.no_grad():
        assert torch.allclose(grown[1](ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-6)
    assert "(44, 32), and this model's (40, 32) is not the same; load or resize the base first" in refused(
        tmp_path / "adapter")


def test_tied_weights_that_peft_adapts_in_one_place(tmp_path):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(llama(tied=True), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
        theirs.save_pretrained(str(tmp_path))
    message = refused(tmp_path, fresh("llama_tied"))
    assert "'model.embed_tokens' and 'lm_head' are one tied weight" in message
    assert "Untie them first" in message


def test_what_means_something_else_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    base = torch.nn.ModuleDict({"conv": torch.nn.Conv1d(4, 4, 3, groups=2)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["conv"])).save_pretrained(str(tmp_path))
    own = torch.nn.ModuleDict({"conv": torch.nn.Conv1d(4, 4, 3, groups=2)})
    assert "convolution with groups=2" in refused(tmp_path, own)


@pytest.mark.parametrize("tying", [True, False])
def test_dora_of_a_tied_embedding_in_peft(tying, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True, ensure_weight_tying=tying)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(fresh("llama_tied"), config).save_pretrained(str(tmp_path))
    assert "PEFT's DoRA gives each of its places lengths of their own" in refused(tmp_path, fresh("llama_tied"))


# -- pickle -------------------------------------------------------------------------------------------------
class Boom:
    def __reduce__(self):
        return (open, ("veneer-was-here", "w"))


def test_pickle_files(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = {k: t.clone() for k, t in read_tensors(saved / "adapter_model.safetensors")[0].items()}
    want = fresh("llama")
    veneer.load(want, saved)
    for name in ("adapter_model.safetensors", "veneer.json"):
        (saved / name).unlink()
    torch.save(tensors, saved / "adapter_model.bin")
    message = refused(saved)
    assert "adapter_model.bin is a pickle file, which can run code when it is opened" in message
    assert "allow_pickle=True" in message
    model = fresh("llama")
    veneer.load(model, saved, allow_pickle=True)
    assert torch.equal(outputs(model, "llama"), outputs(want, "llama"))
    torch.save({"x": Boom()}, saved / "adapter_model.bin")
    assert "holds something other than tensors" in refused(saved, allow_pickle=True)
    assert not (tmp_path / "veneer-was-here").exists()


# -- the adapter that is there already ----------------------------------------------------------------------
def test_filling_an_adapter_of_the_same_plan(saved):
    model = fresh("llama")
    veneer.attach(model, {"*.q_proj": LoRA(rank=2, alpha=3, dropout=0.1), "*.v_proj": LoRA(rank=2, alpha=3)}, seed=9)
    params = veneer.trainable(model)
    veneer.load(model, saved)
    assert [id(p) for p in veneer.trainable(model)] == [id(p) for p in params]
    other = fresh("llama")
    veneer.load(other, saved)
    model.eval()
    assert torch.equal(outputs(model, "llama"), outputs(other, "llama"))


def test_another_plan_than_the_adapter_that_is_there(saved):
    model = fresh("llama")
    veneer.attach(model, {"*.q_proj": LoRA(rank=4), "*.k_proj": LoRA(rank=4)})
    before = outputs(model, "llama")
    with pytest.raises(VeneerError) as error:
        veneer.load(model, saved)
    message = str(error.value)
    assert "'model.layers.0.self_attn.q_proj' is LoRA(rank=2, alpha=3" in message
    assert "unexpected: 'model.layers.0.self_attn.v_proj' is in the file" in message
    assert "missing: 'model.layers.1.self_attn.k_proj', which adapter 'default' on this model is on" in message
    assert torch.equal(outputs(model, "llama"), before)
    veneer.load(model, saved, name="second")
    assert list(veneer.adapters(model)) == ["default", "second"]


def test_merged_adapter_is_not_overwritten(saved):
    model = fresh("llama")
    veneer.load(model, saved)
    veneer.merge(model)
    with pytest.raises(VeneerError, match=r"adapter 'default' is merged .* veneer.unmerge"):
        veneer.load(model, saved)


# -- save ---------------------------------------------------------------------------------------------------
def test_unknown_name(tmp_path):
    with pytest.raises(VeneerError, match="no adapter named 'defualt' on this model; did you mean 'default'"):
        veneer.save(adapted(mixed(), {"head": LoRA()}), tmp_path, name="defualt")


def test_no_values_on_meta(tmp_path):
    with torch.device("meta"):
        model = mixed()
    veneer.attach(model, {"head": LoRA()})
    with pytest.raises(VeneerError, match="the adapter of 'head' is on the meta device and has no values yet"):
        veneer.save(model, tmp_path)


def test_two_adapters_in_one_directory(tmp_path):
    veneer.save(adapted(fresh("mixed"), {"head": LoRA(rank=1), "block.0": DoRA(LoRA(rank=1))}), tmp_path)
    veneer.save(adapted(fresh("mixed"), {"block.*": LoRA(rank=1)}), tmp_path / "other")
    bare(tmp_path / "other")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.move(tmp_path / "other" / name, tmp_path / name)
    assert "two adapters in" in refused(tmp_path, fresh("mixed"))
    assert veneer.load(fresh("mixed"), tmp_path / "adapter_model.safetensors").weights == 2
    assert veneer.load(fresh("mixed"), tmp_path / "veneer.safetensors").weights == 2
