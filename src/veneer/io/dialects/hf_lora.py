"""LoRA and DoRA in PEFT's files: the config keys, and what they mean for a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from veneer.io.dialects import hf_lora_read, hf_lora_write
from veneer.io.dialects.hf_base import Draft, FileType, Reading
from veneer.io.records import Record
from veneer.method import VeneerError, nearest

_KEYS: dict[str, Any] = {
    "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "lora_bias": False,
    "bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "exclude_modules": None, "target_parameters": None,
    "trainable_token_indices": None, "ensure_weight_tying": False, "init_lora_weights": True,
}
#: of LoraConfig, without influence on what a loaded adapter computes
PASSED_OVER = frozenset({"megatron_core", "runtime_config", "qalora_group_size", "loftq_config", "eva_config",
                         "corda_config", "lora_ga_config"})
#: of LoraConfig, with influence
REFUSED = {
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "the adapter is live only after certain tokens",
    "use_qalora": "it pools the input of A",
    "arrow_config": "it routes every token among several adapters",
    "kasa_config": "it changes the base weights",
    "monteclora_config": "it samples the weights",
    "velora_config": "it compresses activations",
    "use_bdlora": "its factors are block-diagonal",
    "megatron_config": "it is for Megatron's layers",
}
#: starts that leave the base as it is
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica", None)
#: others take a part of it away, and the file is relative to the rest: what of that no file holds
_LOST_STARTS = {
    "pissa_niter": "its random numbers", "corda": "the data it was given", "lora_ga": "the data it was given",
    "loftq": "the quantised weights themselves",
}
_CONVERT = ("Where it was trained, PEFT can make plain LoRA of it: model.save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…)")
_MERGE = "Where it was trained, merge it into the base (model.merge_and_unload()), and use that model instead"


class LoraFiles(FileType):
    """`peft.LoraConfig`, with `use_dora`; also for files with nothing but modules_to_save and the like."""

    peft_type = "LORA"
    keys = _KEYS
    passed_over = PASSED_OVER
    refused = REFUSED
    bias_only = "lora_only"

    def piece(self, part: str, kind: str) -> str:
        return hf_lora_read.piece(part, kind)

    def place(self, draft: Draft, records: Sequence[Record]) -> None:
        hf_lora_write.place(draft, records)

    def config(self, draft: Draft) -> dict[str, Any]:
        return hf_lora_write.config(draft)

    def check(self, config: Mapping[str, Any]) -> None:
        start = config["init_lora_weights"]
        if start in _PLAIN_STARTS or hf_lora_read.restart(config) is not None:
            return
        lost = next((what for name, what in _LOST_STARTS.items() if str(start).lower().startswith(name)), None)
        if lost is None:
            known = [str(name) for name in (*_PLAIN_STARTS, *hf_lora_read.RESTARTS, *_LOST_STARTS)]
            raise VeneerError(f"adapter_config.json: unknown init_lora_weights={start!r}{nearest(str(start), known)}")
        raise VeneerError(f"adapter_config.json: init_lora_weights={start!r} changed the base weights when training "
                          "began, and this file is relative to the changed ones. They cannot be made again without "
                          f"{lost}, which it does not hold. {_MERGE if start == 'loftq' else _CONVERT}")

    def read(self, reading: Reading, key: str, name: str, tensor: Tensor) -> bool:
        return hf_lora_read.read(reading, key, name, tensor)

    def finish(self, reading: Reading) -> None:
        hf_lora_read.finish(reading)

    def describe(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Counter[str], set[str]]:
        kind = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
        found = Counter(f"{kind} with {tensor.shape[0]} rows in A" for key, tensor in tensors.items()
                        if key.endswith((".lora_A.weight", ".lora_embedding_A")))
        return found, {key for key in tensors if ".lora_" in key}
