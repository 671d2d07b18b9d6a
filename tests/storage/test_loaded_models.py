"""Models that transformers quantises while it loads them, and what importing Veneer brings along."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import veneer
from veneer import LoRA
from veneer.storage import packed_storage

from .test_libraries import shake


def _bitsandbytes_4bit():
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.bfloat16)


def _bitsandbytes_8bit():
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao():
    config = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()
    from transformers import TorchAoConfig

    return TorchAoConfig(config)


@pytest.mark.parametrize(("config", "storage"), [(_bitsandbytes_4bit, "bitsandbytes 4-bit"),
                                                 (_bitsandbytes_8bit, "bitsandbytes 8-bit"), (_torchao, "torchao")])
def test_a_model_loaded_quantised(config, storage: str, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes))
    made.bfloat16().save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config(),
                                                              dtype=torch.bfloat16, device_map="cpu")
    assert packed_storage(model.model.layers[0].mlp.up_proj).name == storage
    veneer.attach(model, LoRA(rank=4))
    shake(model)
    ids = torch.randint(0, 64, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    veneer.save(model, tmp_path / "adapter")
    with torch.no_grad():
        adapted = model.eval()(input_ids=ids).logits
        veneer.merge(model, keep=False)
        veneer.detach(model)
        merged = model(input_ids=ids).logits
    assert (adapted.float() - merged.float()).norm() < 0.1 * adapted.float().norm()
    assert {m.weight.dtype for m in model.modules() if type(m) is torch.nn.Linear} == {torch.bfloat16}
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    veneer.load(dense, tmp_path / "adapter")
    # transformers takes it for an ordinary model again
    assert not getattr(model, "is_quantized", False)
    assert "quantization_config" not in model.config.to_dict()
    model.to(torch.float16).to(torch.bfloat16).save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, merged, atol=0.05)



def test_import_brings_no_library_of_a_storage() -> None:
    names = ("bitsandbytes", "torchao", "hqq", "gguf", "transformers", "gptqmodel", "auto_gptq", "awq")
    code = f"import sys, veneer; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
