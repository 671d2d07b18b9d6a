"""A tiny Llama as a GGUF file, written on the spot as llama.cpp's converter would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tiny import CHATML
from tokenizers.pre_tokenizers import ByteLevel

ROPE_THETA = 100000.0
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k as such files have them: of each head, the two halves interleaved."""
    parts = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return parts.swapaxes(1, 2).reshape(weight.shape)


def write_tiny_gguf(path: Path, kind: str = "Q4_1", dense: str | None = None) -> Path:
    """Linear weights as `kind`, but `dense` (a part of a tensor's name) in fp16; embeddings tied to the head."""
    writer: Any = gguf.GGUFWriter(str(path), "llama")
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), "aa", "bb"]
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a a", "b b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML)
    generator = torch.Generator().manual_seed(0)

    def add(name: str, *shape: int, heads: int = 0) -> None:
        values = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).numpy()
        if len(shape) == 1 or name.startswith("token_embd"):
            writer.add_tensor(name, values + (len(shape) == 1))
        elif dense is not None and dense in name:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            values = turned(values, heads) if heads else values
            quant = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(values, quant), raw_dtype=quant)

    add("token_embd.weight", len(tokens), WIDTH)
    add("output_norm.weight", WIDTH)
    for i in range(LAYERS):
        add(f"blk.{i}.attn_norm.weight", WIDTH)
        add(f"blk.{i}.ffn_norm.weight", WIDTH)
        add(f"blk.{i}.attn_q.weight", WIDTH, WIDTH, heads=HEADS)
        add(f"blk.{i}.attn_k.weight", WIDTH * KV_HEADS // HEADS, WIDTH, heads=KV_HEADS)
        add(f"blk.{i}.attn_v.weight", WIDTH * KV_HEADS // HEADS, WIDTH)
        add(f"blk.{i}.attn_output.weight", WIDTH, WIDTH)
        add(f"blk.{i}.ffn_gate.weight", INNER, WIDTH)
        add(f"blk.{i}.ffn_up.weight", INNER, WIDTH)
        add(f"blk.{i}.ffn_down.weight", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
