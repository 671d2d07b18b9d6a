"""Tiny models, a tokenizer like Llama's, and conversations, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

GOLDEN = Path(__file__).parent / "golden"
CHATML = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def make_tokenizer() -> Any:
    """A token for each character, <s> before every text, </s> as one token."""
    characters = [chr(c) for c in range(32, 127)] + ["\n", "é", "日", "本"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_model(tokenizer: Any, bias: bool = False, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, attention_bias=bias, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def conversation(name: str, *values: str) -> dict[str, Any]:
    """One conversation in which human and gpt take turns."""
    return {"id": name, "conversations": [{"from": ("human", "gpt")[i % 2], "value": value}
                                          for i, value in enumerate(values)]}


def conversations(count: int) -> list[dict[str, Any]]:
    """Conversations of different lengths, every third of two turns."""
    rows = []
    for i in range(count):
        turns = ["say " + "ab"[i % 2] * (i % 5 + 1), "AB"[i % 2] * (i % 5 + 1)] * (2 if i % 3 == 0 else 1)
        rows.append(conversation(f"identity_{i}", *turns))
    return rows


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path
