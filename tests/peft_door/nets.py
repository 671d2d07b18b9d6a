"""Six architectures of transformers, tiny, with seeded random weights: what the tests of this front door run on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="the tiny models are transformers'")

_SEED = 7


def decoder(tied: bool = False, layers: int = 3) -> nn.Module:
    """Llama with grouped queries: no biases, a head of its own unless `tied`."""
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1,
        eos_token_id=2)
    return _made(transformers.LlamaForCausalLM, config)


def conv1d() -> nn.Module:
    """GPT-2: `Conv1D` layers, biases, and a head that is tied to the embedding."""
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1,
                                     eos_token_id=2, pad_token_id=0)
    return _made(transformers.GPT2LMHeadModel, config)


def encoder(labels: int = 3) -> nn.Module:
    """BERT for sequence classification: `classifier` is its head."""
    config = transformers.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=24, max_position_embeddings=32, num_labels=labels)
    return _made(transformers.BertForSequenceClassification, config)


def encoder_decoder() -> nn.Module:
    """T5: one embedding in several places."""
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2,
                                   num_heads=2, decoder_start_token_id=0, pad_token_id=0)
    return _made(transformers.T5ForConditionalGeneration, config)


def vision() -> nn.Module:
    """ViT for image classification: a convolution at the bottom, `classifier` at the top."""
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                                    image_size=8, patch_size=4, num_labels=3)
    return _made(transformers.ViTForImageClassification, config)


def experts() -> nn.Module:
    """Mixtral: the experts of a layer are stacked in two parameters."""
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2)
    return _made(transformers.MixtralForCausalLM, config)


ALL = (decoder, conv1d, encoder, encoder_decoder, vision, experts)


def inputs_for(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for the model's forward: two rows, the same each time."""
    generator = torch.Generator().manual_seed(3)
    kind = model.config.model_type  # type: ignore[union-attr]
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, 40, (2, 6), generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "t5":
        found["decoder_input_ids"] = torch.randint(3, 40, (2, 4), generator=generator)
    return found


def _made(kind: Any, config: Any) -> nn.Module:
    state = torch.get_rng_state()
    torch.manual_seed(_SEED)
    model = kind(config).eval()
    torch.set_rng_state(state)
    return model
