"""The tables: what PEFT 0.21 calls the options and tensors of each method, and where it differs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from veneer.hosts import Layout
from veneer.io.dialects.hf_base import whole_number
from veneer.io.dialects.hf_family import Family, Option, Parts
from veneer.io.records import Site
from veneer.method import Shape
from veneer.methods import LoHa, LoKr, RandLoRA, VBLoRA, VeRA

#: PEFT's config of these has no exclude_modules
_NO_EXCLUDED = {"init_weights": True}


def _alpha(method: Any) -> float:
    return whole_number(method.rank if method.alpha is None else method.alpha)


def _large_kernel(shape: Shape) -> bool:
    return torch.Size(shape.kernel).numel() > 1


# -- LoHa and LoKr ------------------------------------------------------------------------------------------
_CORES = ("t1", "t2")
_LYCORIS = {
    "r": Option("rank", 8, pattern="rank_pattern"),
    "alpha": Option("alpha", 8, pattern="alpha_pattern", write=_alpha),
    "rank_dropout": Option("rank_dropout", 0.0, training=True),
    "module_dropout": Option("module_dropout", 0.0, training=True),
    "use_effective_conv2d": Option("effective_conv", False, where=_large_kernel),
}


def _cores_to_file(parts: Parts, layout: Layout) -> Parts:
    """PEFT keeps the core of a Conv1d with a kernel of one more dimension, (r, r, k, 1)."""
    return {part: tensor.unsqueeze(-1) if part in _CORES and tensor.dim() == 3 else tensor
            for part, tensor in parts.items()}


def _cores_from_file(parts: Parts, layout: Layout) -> Parts:
    extra = len(layout.shape.kernel) == 1
    return {part: tensor.squeeze(-1) if extra and part in _CORES and tensor.dim() == 4 else tensor
            for part, tensor in parts.items()}


def _loha_remarks(method: Any, dtypes: Collection[torch.dtype]) -> list[str]:
    return ["PEFT always rescales what LoHa's rank_dropout leaves; veneer.json keeps rank_dropout_scale=False"] \
        if method.rank_dropout and not method.rank_dropout_scale else []


LOHA = Family(
    "LOHA", LoHa, ("Linear", "Conv1d", "Conv2d"), _LYCORIS,
    {"w1_a": "hada_w1_a", "w1_b": "hada_w1_b", "w2_a": "hada_w2_a", "w2_b": "hada_w2_b",
     "t1": "hada_t1", "t2": "hada_t2"},
    to_file=_cores_to_file, from_file=_cores_from_file, carried=("groups", "dilation"), on_save=_loha_remarks)


def _lokr_to_file(parts: Parts, layout: Layout) -> Parts:
    """A whole W₂ of a convolution is (o₂, i₂, *kernel) there, and flat here."""
    kernel = layout.shape.kernel
    found = dict(_cores_to_file(parts, layout))
    if kernel and "w2" in found:
        found["w2"] = found["w2"].reshape(found["w2"].shape[0], -1, *kernel)
    return found


def _lokr_from_file(parts: Parts, layout: Layout) -> Parts:
    kernel = layout.shape.kernel
    found = dict(_cores_from_file(parts, layout))
    if kernel and "w2" in found and found["w2"].shape[2:] == kernel:
        found["w2"] = found["w2"].flatten(1)
    return found


def _lokr_refusal(method: Any, site: Site, parts: Collection[str]) -> str | None:
    kernel = site.layout.shape.kernel
    if len(kernel) == 1 and "w2" in parts:
        return ("PEFT puts the two factors of LoKr on a Conv1d together in another order when the second is whole "
                "(rank at least half its longer side)")
    if "t2" in parts and method.rank == 1 and (*kernel, 1)[1] == 1:
        return "PEFT's LoKr of rank 1 with a decomposed kernel of width 1 fails in torch.kron"
    return None


LOKR = Family(
    "LOKR", LoKr, ("Linear", "Conv1d", "Conv2d"),
    {**_LYCORIS,
     "rank_dropout_scale": Option("rank_dropout_scale", False, training=True),
     "decompose_both": Option("decompose_both", False),
     "decompose_factor": Option("decompose_factor", -1),
     "init_weights": Option("init", True, training=True,
                            write=lambda method: "lycoris" if method.init == "lycoris" else True,
                            read=lambda value: "lycoris" if value == "lycoris" else "kaiming")},
    {"w1": "lokr_w1", "w1_a": "lokr_w1_a", "w1_b": "lokr_w1_b", "w2": "lokr_w2", "w2_a": "lokr_w2_a",
     "w2_b": "lokr_w2_b", "t2": "lokr_t2"},
    to_file=_lokr_to_file, from_file=_lokr_from_file, carried=("groups", "dilation"), refusal=_lokr_refusal)


# -- VeRA and RandLoRA --------------------------------------------------------------------------------------
def _rounded(dtypes: Collection[torch.dtype]) -> list[str]:
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes if dtype.itemsize < 4]
    return [f"the bases are not in the file; PEFT draws them again and rounds them to the base model's "
            f"{' and '.join(names)}, which Veneer does not"] if names else []


def _vera_remarks(method: Any, dtypes: Collection[torch.dtype]) -> list[str]:
    return [] if method.save_bases else _rounded(dtypes)


VERA = Family(
    "VERA", VeRA, ("Linear", "Conv1D"),
    {"r": Option("rank", 256),
     "d_initial": Option("d_initial", 0.1),
     "vera_dropout": Option("dropout", 0.0),
     "projection_prng_key": Option("seed", 0),
     "save_projection": Option("save_bases", True)},
    {"b": "vera_lambda_b", "d": "vera_lambda_d"},
    more_keys=_NO_EXCLUDED, bias_only="vera_only",
    shared={"base_model.vera_A": "shared.A", "base_model.vera_B": "shared.B"}, derived="bases",
    on_save=_vera_remarks, on_load=_vera_remarks)


def _randlora_remarks(method: Any, dtypes: Collection[torch.dtype]) -> list[str]:
    if method.save_bases:
        return ["PEFT keeps a copy of RandLoRA's bases for every layer and warns that those are missing; it takes the "
                "one copy that is in the file for all of them"]
    return _drawn_again(method, dtypes)


def _drawn_again(method: Any, dtypes: Collection[torch.dtype]) -> list[str]:
    if method.save_bases:
        return []
    if method.sparsity is not None:
        return _rounded(dtypes)
    return ["RandLoRA's bases are not in the file; PEFT draws them again from projection_prng_key, in "
            "bfloat16 on machines with a GPU that has it or with no GPU, and in float16 on the others. Only the former "
            "get the bases that Veneer has: save them (save_bases, in PEFT save_projection) for the latter"]


RANDLORA = Family(
    "RANDLORA", RandLoRA, ("Linear", "Conv1D"),
    {"r": Option("rank", 32),
     "randlora_alpha": Option("alpha", 640, write=lambda method: whole_number(method.alpha)),
     "randlora_dropout": Option("dropout", 0.0),
     "projection_prng_key": Option("seed", 0),
     "save_projection": Option("save_bases", True),
     "sparse": Option("sparsity", False, write=lambda method: method.sparsity == "sparse",
                      read=lambda value: "sparse" if value else None),
     "very_sparse": Option("sparsity", False, write=lambda method: method.sparsity == "very_sparse",
                           read=lambda value: "very_sparse" if value else None)},
    {"lambda_": "randlora_lambda", "gamma": "randlora_gamma"},
    more_keys=_NO_EXCLUDED, bias_only="randlora_only",
    shared={"base_model.randlora_A": "shared.A", "base_model.randlora_B": "shared.B"},
    copies={"randlora_A": "shared.A", "randlora_B": "shared.B"}, derived="bases",
    on_save=_randlora_remarks, on_load=_drawn_again)


# -- VB-LoRA ------------------------------------------------------------------------------------------------
def _vblora_refusal(method: Any, site: Site, parts: Collection[str]) -> str | None:
    shape, length = site.layout.shape, method.vector_length
    if shape.out % length or shape.in_ % length:
        return (f"PEFT's VB-LoRA needs sizes that vector_length={length} divides, and this weight is "
                f"{shape.out} × {shape.in_}")
    return None


VBLORA = Family(
    "VBLORA", VBLoRA, ("Linear", "Conv1D"),
    {"r": Option("rank", 4),
     "num_vectors": Option("num_vectors", 256),
     "vector_length": Option("vector_length", 256),
     "topk": Option("topk", 2),
     "vblora_dropout": Option("dropout", 0.0),
     "init_vector_bank_bound": Option("init_vector_bank_bound", 0.02),
     "init_logits_std": Option("init_logits_std", 0.1),
     "save_only_topk_weights": Option("save_only_topk_weights", False)},
    {"logits_A": "vblora_logits_A", "logits_B": "vblora_logits_B",
     "logits_A_indices": "vblora_logits_A_topk_indices", "logits_A_weights": "vblora_logits_A_topk_weights",
     "logits_B_indices": "vblora_logits_B_topk_indices", "logits_B_weights": "vblora_logits_B_topk_weights"},
    more_keys={"exclude_modules": None}, bias_only="vblora_only",
    shared={"base_model.vblora_vector_bank": "shared.bank"}, refusal=_vblora_refusal)
