"""Which modules are adapted where a config names none, by the `model_type` of the model's own config; and what
transformers 5 made of the experts of models whose adapters name them one by one.

Facts of Hugging Face PEFT 0.21 (peft/utils/constants.py, peft/utils/transformers_weight_conversion.py) and of
transformers 5 (transformers/conversion_mapping.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from veneer.peft.types import FAMILY, PeftType

Targets = tuple[str, ...] | str

_QV = ("q_proj", "v_proj")
_QUERY_VALUE = ("query", "value")
_FUSED = ("query_key_value",)
_GEMMA4 = r".*language_model\..*\.(q_proj|v_proj)"
_NEMOTRON = ("q_proj", "k_proj", "v_proj", "o_proj")
_BART_ALL = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_DEBERTA_ALL = ("query_proj", "key_proj", "value_proj", "dense")

#: LoRA, LoHa, LoKr, RandLoRA
_LORA: dict[str, Targets] = {
    **dict.fromkeys(("bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm", "gemma",
                     "gemma2", "gemma3_text", "qwen2", "qwen3"), _QV),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), _QUERY_VALUE),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon"), _FUSED),
    "t5": ("q", "v"), "mt5": ("q", "v"), "blip-2": ("q", "v", *_QV), "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",), "gpt2": ("c_attn",), "gpt_bigcode": ("c_attn",), "btlm": ("c_proj", "c_attn"),
    "mpt": ("Wqkv",), "codegen": ("qkv_proj",), "phi": (*_QV, "fc1", "fc2"), "gemma4": _GEMMA4,
    "nemotron_h": _NEMOTRON, "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}
_VBLORA: dict[str, Targets] = {
    **dict.fromkeys(("gptj", "gpt_neo", "llama", "llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _QV),
    **dict.fromkeys(("bart", "opt"), _BART_ALL), **dict.fromkeys(("bert", "roberta"), _QUERY_VALUE),
    **dict.fromkeys(("bloom", "gpt_neox"), _FUSED), **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "t5": ("q", "k", "v", "o", "wi", "wo"), "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    "deberta-v2": _DEBERTA_ALL, "deberta": ("in_proj",), "gemma4": _GEMMA4, "nemotron_h": _NEMOTRON,
}
_ADALORA: dict[str, Targets] = {**_VBLORA, "roberta": ("query", "key", "value", "dense")}
_OF_TYPE = {PeftType.VERA: {**_LORA, "phi": _QV}, PeftType.VBLORA: _VBLORA, PeftType.ADALORA: _ADALORA}
#: a table for each method, which users may add to
_TABLES: dict[PeftType, dict[str, list[str] | str]] = {
    kind: {name: found if isinstance(found, str) else list(found) for name, found in _OF_TYPE.get(kind, _LORA).items()}
    for kind in FAMILY}

#: how the parts of one expert, and the router, were called before transformers 5 → the parameter they are in now
_MIXTRAL = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_QWEN2_MOE = {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_EXPERTS: dict[str, Mapping[str, str]] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    **dict.fromkeys((
        "Dots3NoteTextModel", "afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
        "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "glm4v_moe", "longcat_flash", "solar_open", "mellum", "qwen3_moe",
        "beam", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text", "qwen3_next", "hunyuan_v1_moe",
        "flex_olmo", "olmoe", "exaone_moe", "cohere2_moe", "UnlimitedOcrTextModel"), _QWEN2_MOE),
}


def targets_by_architecture(peft_type: PeftType) -> dict[str, list[str] | str]:
    """The table of a method itself: `model_type` → target_modules."""
    return _TABLES[peft_type]


def default_targets(peft_type: PeftType, model_type: str | None) -> set[str] | str | None:
    """target_modules for a model of this architecture, or None where none are known."""
    found = _TABLES[peft_type].get(model_type or "")
    return found if found is None or isinstance(found, str) else set(found)


def known_architectures(peft_type: PeftType) -> list[str]:
    """The architectures that `default_targets` knows."""
    return sorted(_TABLES[peft_type])


def fused_experts(model_type: str | None) -> Mapping[str, str]:
    """Name of a part of one expert → name of the parameter that all of them are in; empty for other models."""
    return _EXPERTS.get(model_type or "", {})
