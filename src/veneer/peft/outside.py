"""Public names of Hugging Face PEFT 0.21 that are outside the LoRA family, so that asking for one says so."""

from __future__ import annotations

#: methods that have a config and a model of their own
_METHODS = (
    "Adamss", "AdaptionPrompt", "BOFT", "Beft", "C3A", "Deft", "Delora", "FourierFT", "Frod", "Glora", "Gralora", "HRA",
    "Hira", "IA3", "LNTuning", "Lily", "Miss", "OFT", "OSF", "Peanut", "Poly", "Psoft", "Pvera", "Road", "Shadow",
    "Shira", "Supertuning", "TinyLora", "TrainableTokens", "UniLora", "WaveFT", "XLora")
_OTHERS = (
    "ArrowConfig", "BdLoraConfig", "CPTConfig", "CPTEmbedding", "CartridgeConfig", "CartridgeEncoder", "KasaConfig",
    "MontecloraConfig", "MultitaskPromptTuningConfig", "MultitaskPromptTuningInit", "PrefixEncoder",
    "PrefixTuningConfig", "PromptEmbedding", "PromptEncoder", "PromptEncoderConfig",
    "PromptEncoderReparameterizationType", "PromptLearningConfig", "PromptTuningConfig", "PromptTuningInit",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING", "VeloraConfig",
    "bloom_model_postprocess_past_key_value", "compose_cartridge_adapters", "create_arrow_model",
    "find_kappa_target_modules", "initialize_kv_prefix_from_past_key_values", "initialize_kv_prefix_from_text",
    "prompt_embeddings_from_past_key_values")

OUTSIDE = frozenset([f"{name}{part}" for name in _METHODS for part in ("Config", "Model")] + list(_OTHERS))
