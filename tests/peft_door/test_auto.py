"""AutoPeftModel…: base and adapter from the adapter's files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.peft_door import nets
from torch import nn

import veneer.peft as ours
from veneer.method import VeneerError

transformers = pytest.importorskip("transformers")

#: class → the base for it, and the modules that are adapted
KINDS = {
    "CausalLM": ("CAUSAL_LM", nets.decoder, ["q_proj"]),
    "Seq2SeqLM": ("SEQ_2_SEQ_LM", nets.encoder_decoder, ["q"]),
    "SequenceClassification": ("SEQ_CLS", nets.encoder, ["query"]),
    "TokenClassification": ("TOKEN_CLS", lambda: bert(transformers.BertForTokenClassification), ["query"]),
    "QuestionAnswering": ("QUESTION_ANS", lambda: bert(transformers.BertForQuestionAnswering, 2), ["query"]),
    "FeatureExtraction": ("FEATURE_EXTRACTION", lambda: bert(transformers.BertModel), ["query"]),
}


def bert(kind: Any, labels: int = 3) -> nn.Module:
    config = transformers.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=24, max_position_embeddings=32, num_labels=labels)
    torch.manual_seed(1)
    return kind(config).eval()


def saved(tmp_path: Path, base: Any, **options: Any) -> Any:
    """The base in "base", an adapter with random values in "adapter"; returns the model."""
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base").eval()
    model: Any = ours.get_peft_model(base, ours.LoraConfig(r=2, **options)).eval()
    for param in model.parameters():
        if param.requires_grad:
            param.data.add_(torch.randn_like(param) * 0.2)
    model.save_pretrained(tmp_path / "adapter")
    return model


def first(output: Any) -> torch.Tensor:
    return output[0]


@pytest.mark.parametrize("kind", KINDS)
def test_each_task(tmp_path: Path, kind: str) -> None:
    task, base, targets = KINDS[kind]
    model = saved(tmp_path, base(), task_type=task, target_modules=targets)
    found = getattr(ours, f"AutoPeftModelFor{kind}").from_pretrained(tmp_path / "adapter")
    assert type(found) is getattr(ours, f"PeftModelFor{kind}")
    inputs = nets.inputs_for(model.get_base_model())
    with torch.no_grad():
        torch.testing.assert_close(first(found(**inputs)), first(model(**inputs)))
    assert not any(param.requires_grad for param in found.parameters())


def test_options_are_for_whom_they_are_meant(tmp_path: Path) -> None:
    saved(tmp_path, nets.decoder(), task_type="CAUSAL_LM", target_modules=["q_proj"])
    found = ours.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path, adapter_name="mine", is_trainable=True, subfolder="adapter", dtype=torch.bfloat16,
        autocast_adapter_dtype=False)
    assert list(found.peft_config) == ["mine"]
    dtypes = {"lora_" in name: param.dtype for name, param in found.named_parameters()}
    assert dtypes == {True: torch.bfloat16, False: torch.bfloat16}
    assert any(param.requires_grad for param in found.parameters())


def test_a_config_of_ones_own(tmp_path: Path) -> None:
    model = saved(tmp_path, nets.decoder(), task_type="CAUSAL_LM", target_modules=["q_proj"], lora_alpha=4)
    config = ours.PeftConfig.from_pretrained(tmp_path / "adapter")
    config.lora_alpha = 8
    found = ours.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", config=config)
    layers = [each.get_base_model().model.layers[0].self_attn.q_proj.scaling["default"] for each in (model, found)]
    assert layers == [2.0, 4.0]


def test_a_base_that_the_config_names_by_its_class(tmp_path: Path) -> None:
    model = saved(tmp_path, nets.decoder(), target_modules=["q_proj"])
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["auto_mapping"] == {"base_model_class": "LlamaForCausalLM",
                                       "parent_library": "transformers.models.llama.modeling_llama"}
    found = ours.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert type(found) is ours.PeftModel
    inputs = nets.inputs_for(model.get_base_model())
    with torch.no_grad():
        torch.testing.assert_close(found(**inputs).logits, model(**inputs).logits)


def test_libraries_that_are_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, nets.decoder(), target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(file.read_text())
    written["auto_mapping"] = {"base_model_class": "Evil", "parent_library": "transformers_evil"}
    file.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"import 'transformers_evil', which is not in the import allowlist"):
        ours.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    (tmp_path / "transformers_evil.py").write_text("from transformers import LlamaForCausalLM as Evil")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = ours.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["transformers_evil"])
    assert type(found.get_base_model()).__name__ == "LlamaForCausalLM"


def test_embeddings_grow_with_the_tokenizer_beside_the_adapter(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(43)} | {"[UNK]": 43}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    base: Any = nets.decoder()
    base.save_pretrained(tmp_path / "base")
    bigger: Any = type(base).from_pretrained(tmp_path / "base")
    bigger.resize_token_embeddings(44)
    config = ours.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"],
                             modules_to_save=["embed_tokens", "lm_head"])
    model: Any = ours.get_peft_model(bigger, config)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    transformers.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path / "adapter")
    found = ours.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    inputs = {"input_ids": torch.tensor([[1, 43, 41]])}
    with torch.no_grad():
        torch.testing.assert_close(found(**inputs).logits, model(**inputs).logits)
    assert found.get_base_model().get_input_embeddings().weight.shape[0] == 44


def test_a_smaller_tokenizer_changes_nothing(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    saved(tmp_path, nets.decoder(), task_type="CAUSAL_LM", target_modules=["q_proj"])
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path / "adapter")
    found = ours.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert found.get_base_model().get_input_embeddings().weight.shape[0] == 40


def test_what_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, nets.decoder(), task_type="CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"Cannot use `AutoPeftModel` with a task type.*AutoPeftModelForCausalLM"):
        ours.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="Expected target PEFT class: PeftModelForCausalLM, but you have asked for: "
                                         "PeftModelForSeq2SeqLM"):
        ours.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match=r"designed to be instantiated using the `AutoPeftModel.from_pretrained"):
        ours.AutoPeftModel()
    with pytest.raises(OSError, match=r"AutoPeftModelForCausalLM.from_config: a config alone"):
        ours.AutoPeftModelForCausalLM.from_config({})
    file = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(file.read_text())
    for change, message in (({"task_type": None, "auto_mapping": None}, "neither task_type nor auto_mapping"),
                            ({"base_model_name_or_path": None}, "does not name its base model")):
        file.write_text(json.dumps({**written, **change}))
        with pytest.raises((ValueError, VeneerError), match=message):
            ours.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        ours.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "base")
