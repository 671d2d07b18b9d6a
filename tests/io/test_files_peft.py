"""Both directions against the pip-installed peft: what one writes the other computes alike."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from io_models import adapted, fresh, outputs, randomise, relative

import veneer
import veneer.io.tensors
from veneer import DoRA, Full, LoRA, Rows

peft = pytest.importorskip("peft")
BAR = 1e-5

#: name → (base, rules): all of these PEFT can express
WRITTEN = {
    "lora": ("llama", LoRA(rank=4, alpha=8)),
    "some_modules": ("llama", {"*.q_proj": LoRA(rank=4), "*.down_proj": LoRA(rank=4)}),
    "one_layer": ("llama", {"model.layers.1.self_attn.q_proj": LoRA(rank=4)}),
    "rslora": ("llama", LoRA(rank=4, alpha=8, rank_stabilized=True)),
    "rslora_on_some": ("llama", {"*.q_proj": LoRA(rank=4, rank_stabilized=True), "*.v_proj": LoRA(rank=3)}),
    "dora": ("llama", DoRA(LoRA(rank=4, alpha=6))),
    "patterns": ("llama", {"*": None, "*.q_proj": LoRA(rank=4), "*.layers.1.*.q_proj": LoRA(rank=2, alpha=9),
                           "*.mlp.*": LoRA(rank=6, alpha=3), "lm_head": LoRA(rank=5)}),
    "embedding": ("llama", {"*.embed_tokens": LoRA(rank=4, alpha=7), "*.v_proj": LoRA(rank=2)}),
    "bias_all": ("llama", {"*.q_proj": LoRA(rank=2), "*.bias": Full()}),
    "bias_lora_only": ("llama", {"*.q_proj": LoRA(rank=2), "*.q_proj.bias": Full()}),
    "lora_bias": ("llama", {"*.q_proj": LoRA(rank=4, alpha=2, bias=True)}),
    "head": ("llama", {"*.q_proj": LoRA(rank=2), "lm_head": Full(), "*norm": Full()}),
    "full_only": ("llama", {"lm_head": Full()}),
    "rows": ("llama", {"*.q_proj": LoRA(rank=2), "*.embed_tokens": Rows([4, 2, 30])}),
    "rows_only": ("llama", {"*.embed_tokens": Rows([4, 2])}),
    "tied_lora": ("llama_tied", {"*.embed_tokens": LoRA(rank=4, alpha=7), "*.q_proj": LoRA(rank=2)}),
    "tied_rows": ("llama_tied", {"*.embed_tokens": Rows([4, 2, 30]), "*.q_proj": LoRA(rank=2)}),
    "tied_full": ("llama_tied", {"*.embed_tokens": Full(), "*.q_proj": LoRA(rank=2)}),
    "conv1d_linear": ("gpt2", {"*.c_attn": LoRA(rank=4, alpha=3), "*.mlp.c_fc": LoRA(rank=2)}),
    "conv1d_dora": ("gpt2", {"*.c_attn": DoRA(LoRA(rank=4)), "*.attn.c_proj": DoRA(LoRA(rank=2))}),
    "conv1d_bias": ("gpt2", {"*.c_attn": LoRA(rank=4, alpha=4, bias=True), "*.wpe": Full()}),
    "convs": ("mixed", {"conv*": LoRA(rank=3, alpha=5)}),
    "convs_dora": ("mixed", {"conv*": DoRA(LoRA(rank=3, alpha=5)), "block.0": DoRA(LoRA(rank=2))}),
    "embedding_dora": ("llama", {"*.embed_tokens": DoRA(LoRA(rank=4, alpha=7)), "*.v_proj": DoRA(LoRA(rank=2))}),
    "mixed_embedding_dora": ("mixed", {"embed": DoRA(LoRA(rank=3)), "conv*": DoRA(LoRA(rank=2))}),
    "convs_bias": ("mixed", {"conv*": LoRA(rank=4, bias=True)}),
    "mixed_embedding": ("mixed", {"embed": LoRA(rank=3), "block.*": LoRA(rank=2), "head": Full()}),
    "parameters": ("mixed", {"norm": Full(), "block.2": LoRA(rank=2)}),
}


def load_with_peft(base, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*([Mm]issing|did not match|not found|no module was).*")
        return peft.PeftModel.from_pretrained(base, str(path)).eval()


@pytest.mark.parametrize("case", WRITTEN)
def test_peft_loads_what_save_writes(case, tmp_path):
    kind, rules = WRITTEN[case]
    model = adapted(fresh(kind), rules)
    report = veneer.save(model, tmp_path)
    assert report.format == "peft", report.reason
    want = outputs(model, kind)
    assert relative(want, outputs(fresh(kind), kind)) > 1e-3
    got = outputs(load_with_peft(fresh(kind), tmp_path), kind)
    assert relative(got, want) < BAR


@pytest.mark.parametrize("case", WRITTEN)
def test_own_files_come_back_bit_equal(case, tmp_path):
    kind, rules = WRITTEN[case]
    model = adapted(fresh(kind), rules)
    veneer.save(model, tmp_path)
    again = fresh(kind)
    report = veneer.load(again, tmp_path)
    assert report.problems == ()
    assert torch.equal(outputs(again, kind), outputs(model, kind))
    # and as another tool would have written it: by PEFT's files alone
    bare = tmp_path / "bare"
    bare.mkdir()
    tensors, _ = veneer.io.tensors.read_tensors(tmp_path / "adapter_model.safetensors")
    with open(bare / "adapter_model.safetensors", "wb") as file:
        veneer.io.tensors.write_tensors(file, tensors, {"format": "pt"})
    (bare / "adapter_config.json").write_text((tmp_path / "adapter_config.json").read_text())
    other = fresh(kind)
    assert veneer.load(other, bare).problems == ()
    assert relative(outputs(other, kind), outputs(model, kind)) < BAR
    assert json.loads((bare / "adapter_config.json").read_text())["peft_type"] == "LORA"


#: name → (base, LoraConfig arguments)
READ = {
    "lora": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "dora": ("llama", {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "regex": ("llama", {"r": 4, "target_modules": r".*\.layers\.1\..*_proj"}),
    "layers": ("llama", {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded": ("llama", {"r": 4, "target_modules": ["q_proj", "k_proj"],
                           "exclude_modules": ["layers.0.self_attn.k_proj"]}),
    "patterns": ("llama", {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "up_proj"],
                           "rank_pattern": {"up_proj": 2, r"layers\.1\..*\.q_proj": 6},
                           "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 11}}),
    "gaussian": ("llama", {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "embedding": ("llama", {"r": 4, "lora_alpha": 9, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "bias_all": ("llama", {"r": 4, "target_modules": ["q_proj"], "bias": "all"}),
    "bias_all_and_head": ("mixed", {"r": 4, "target_modules": ["block.0"], "bias": "all", "modules_to_save": ["head"]}),
    "bias_lora_only": ("llama", {"r": 4, "target_modules": ["q_proj"], "bias": "lora_only"}),
    "lora_bias": ("llama", {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj"], "lora_bias": True}),
    "modules_to_save": ("llama", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "rows": ("llama", {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}),
    "rows_by_name": ("llama", {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7]}}),
    "tied_rows": ("llama_tied", {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}),
    "tied_lora": ("llama_tied", {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied_full": ("llama_tied", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
                                 "ensure_weight_tying": True}),
    "conv1d_linear": ("gpt2", {"r": 4, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj"]}),
    "conv1d_dora": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "use_dora": True}),
    "convs": ("mixed", {"r": 4, "lora_alpha": 6, "target_modules": ["conv1", "conv2"]}),
    "convs_dora": ("mixed", {"r": 4, "target_modules": ["conv1", "conv2", "block.2"], "use_dora": True}),
    "convs_bias": ("mixed", {"r": 4, "lora_alpha": 6, "target_modules": ["conv1", "conv2"], "lora_bias": True}),
    "mixed_embedding": ("mixed", {"r": 4, "target_modules": ["embed"]}),
    "embedding_dora": ("mixed", {"r": 4, "lora_alpha": 6, "target_modules": ["embed", "block.0"], "use_dora": True}),
    "attention": ("mixed", {"r": 4, "lora_alpha": 6, "target_modules": ["attention"]}),
    "attention_bias": ("mixed", {"r": 4, "target_modules": ["attention", "block.0"], "bias": "lora_only"}),
    "parameters": ("mixed", {"r": 4, "target_modules": [], "target_parameters": ["block.0.weight", "block.2.weight"]}),
}


def written_by_peft(base, options, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
        randomise(model)
        model.save_pretrained(str(path))
    return model


@pytest.mark.parametrize("case", READ)
def test_load_reads_what_peft_writes(case, tmp_path):
    kind, options = READ[case]
    theirs = written_by_peft(fresh(kind), options, tmp_path)
    want = outputs(theirs, kind)
    assert relative(want, outputs(fresh(kind), kind)) > 1e-3
    model = fresh(kind)
    report = veneer.load(model, tmp_path)
    assert report.problems == ()
    assert relative(outputs(model, kind), want) < BAR
    assert all(p.requires_grad for p in veneer.adapters(model)["default"].weights[next(
        iter(veneer.adapters(model)["default"].weights))].parameters())


@pytest.mark.parametrize("case", READ)
def test_peft_to_veneer_to_peft(case, tmp_path):
    kind, options = READ[case]
    theirs = written_by_peft(fresh(kind), options, tmp_path / "peft")
    model = fresh(kind)
    veneer.load(model, tmp_path / "peft")
    report = veneer.save(model, tmp_path / "veneer")
    if "attention" in case:
        assert report.format == "native"
        assert "out_proj of nn.MultiheadAttention twice" in report.reason
        return
    assert report.format == "peft", report.reason
    assert relative(outputs(load_with_peft(fresh(kind), tmp_path / "veneer"), kind), outputs(theirs, kind)) < BAR
