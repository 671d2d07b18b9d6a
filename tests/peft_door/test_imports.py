"""Every import path of PEFT's for this family, what importing costs, and what is said of names outside the family."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import veneer.peft as ours
from veneer.peft.outside import OUTSIDE

#: module below `peft` → public names in it
PATHS = {
    "": ["LoraConfig", "PeftModel", "get_peft_model", "TaskType", "PeftMixedModel", "AutoPeftModelForCausalLM"],
    "auto": ["AutoPeftModel", "AutoPeftModelForCausalLM", "MODEL_TYPE_TO_PEFT_MODEL_MAPPING"],
    "config": ["PeftConfig", "PeftConfigMixin"],
    "functional": ["cast_adapter_dtype", "delete_adapter", "get_peft_model_state_dict", "inject_adapter_in_model",
                   "set_adapter", "set_peft_model_state_dict", "set_requires_grad"],
    "helpers": ["DoraCaching", "check_if_peft_model", "disable_input_dtype_casting", "rescale_adapter_scale",
                "update_forward_signature", "update_generate_signature", "update_signature"],
    "import_utils": ["is_aqlm_available", "is_bnb_4bit_available", "is_bnb_available", "is_diffusers_available",
                     "is_eetq_available", "is_gptqmodel_available", "is_hqq_available", "is_inc_available",
                     "is_optimum_available", "is_te_available", "is_torch_tpu_available", "is_torchao_available",
                     "is_xpu_available"],
    "mapping": ["PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING",
                "PEFT_TYPE_TO_TUNER_MAPPING", "get_peft_config", "inject_adapter_in_model"],
    "mapping_func": ["get_peft_model"],
    "mixed_model": ["PeftMixedModel"],
    "optimizers": ["create_lorafa_optimizer", "create_loraplus_optimizer"],
    "peft_model": ["PEFT_TYPE_TO_PREFIX_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PeftConfig", "PeftModel",
                   "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering",
                   "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification", "PeftModelForTokenClassification",
                   "PeftType", "TaskType", "TunerLayerStatus", "TunerModelStatus", "get_layer_status",
                   "get_model_status", "get_peft_model_state_dict", "set_peft_model_state_dict"],
    "tuners": ["AdaLoraConfig", "AdaLoraModel", "LoHaConfig", "LoHaModel", "LoKrConfig", "LoKrModel", "LoraConfig",
               "LoraModel", "RandLoraConfig", "RandLoraModel", "VBLoRAConfig", "VBLoRAModel", "VeraConfig",
               "VeraModel", "EvaConfig", "LoftQConfig", "LoraRuntimeConfig", "get_eva_state_dict",
               "initialize_lora_eva_weights"],
    "tuners.adalora": ["AdaLoraConfig", "AdaLoraLayer", "AdaLoraModel", "SVDLinear"],
    "tuners.adalora.config": ["AdaLoraConfig"],
    "tuners.adalora.layer": ["AdaLoraLayer", "SVDLinear"],
    "tuners.adalora.model": ["AdaLoraModel"],
    "tuners.loha": ["LoHaConfig", "LoHaLayer", "LoHaModel"],
    "tuners.loha.config": ["LoHaConfig"],
    "tuners.loha.layer": ["LoHaLayer"],
    "tuners.lokr": ["LoKrConfig", "LoKrLayer", "LoKrModel"],
    "tuners.lokr.config": ["LoKrConfig"],
    "tuners.lokr.layer": ["LoKrLayer"],
    "tuners.lora": ["Conv2d", "Conv3d", "Embedding", "EvaConfig", "Linear", "Linear4bit", "Linear8bitLt",
                    "LoftQConfig", "LoraConfig",
                    "LoraGAConfig", "LoraLayer", "LoraModel", "LoraRuntimeConfig", "ParamWrapper", "convert_to_lora",
                    "get_eva_state_dict", "initialize_lora_eva_weights", "preprocess_loraga", "save_as_lora"],
    "tuners.lora.bnb": ["Linear4bit", "Linear8bitLt"],
    "tuners.lora.config": ["CordaConfig", "EvaConfig", "LoftQConfig", "LoraConfig", "LoraGAConfig",
                           "LoraRuntimeConfig"],
    "tuners.lora.conversion": ["convert_to_lora", "save_as_lora"],
    "tuners.lora.corda": ["preprocess_corda"],
    "tuners.lora.dora": ["dequantize_module_weight", "gather_params_ctx", "transpose"],
    "tuners.lora.eva": ["forward_fn_dict", "get_eva_state_dict", "initialize_lora_eva_weights",
                        "prepare_layer_inputs_fn_language_modeling", "prepare_model_inputs_fn_language_modeling"],
    "tuners.lora.layer": ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoraLayer", "MultiheadAttention",
                          "ParamWrapper"],
    "tuners.lora.loraga": ["preprocess_loraga"],
    "tuners.lora.model": ["LoraModel"],
    "tuners.lycoris_utils": ["LycorisConfig", "LycorisLayer"],
    "tuners.mixed": ["COMPATIBLE_TUNER_TYPES", "MixedModel"],
    "tuners.randlora": ["RandLoraConfig", "RandLoraLayer", "RandLoraModel"],
    "tuners.randlora.config": ["RandLoraConfig"],
    "tuners.tuners_utils": ["BaseTuner", "BaseTunerLayer", "cast_adapter_dtype", "check_adapters_to_merge",
                            "check_target_module_exists", "delete_adapter", "inspect_matched_modules", "onload_layer",
                            "set_adapter", "set_requires_grad"],
    "tuners.vblora": ["VBLoRAConfig", "VBLoRALayer", "VBLoRAModel"],
    "tuners.vblora.config": ["VBLoRAConfig"],
    "tuners.vera": ["VeraConfig", "VeraLayer", "VeraModel"],
    "tuners.vera.config": ["VeraConfig"],
    "utils": ["CONFIG_NAME", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "ModulesToSaveWrapper", "PeftType",
              "SAFETENSORS_WEIGHTS_NAME", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "TaskType",
              "TrainableTokensWrapper", "WEIGHTS_NAME", "_get_submodules", "id_tensor_storage",
              "cast_mixed_precision_params", "get_base_model_state_dict",
              "get_peft_model_state_dict", "infer_device", "load_peft_weights", "prepare_model_for_kbit_training",
              "replace_lora_weights_loftq", "set_base_model_state_dict", "set_peft_model_state_dict",
              "shift_tokens_right", "transpose"],
    "utils.constants": ["CONFIG_NAME", "EMBEDDING_LAYER_NAMES", "SEQ_CLS_HEAD_NAMES", "TOKENIZER_CONFIG_NAME"],
    "utils.hotswap": ["check_hotswap_configs_compatible", "hotswap_adapter", "hotswap_adapter_from_state_dict",
                      "prepare_model_for_compiled_hotswap"],
    "utils.integrations": ["dequantize_module_weight", "gather_params_ctx", "get_bnb_param_type"],
    "utils.loftq_utils": ["replace_lora_weights_loftq"],
    "utils.other": ["ModulesToSaveWrapper", "TrainableTokensWrapper", "_get_submodules", "fsdp_auto_wrap_policy",
                    "id_tensor_storage", "prepare_model_for_kbit_training"],
    "utils.peft_types": ["PeftType", "TaskType"],
    "utils.save_and_load": ["get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"],
}
#: what must not be imported along
OPTIONAL = ("transformers", "bitsandbytes", "triton", "peft", "accelerate", "huggingface_hub", "hqq", "torchao",
            "tokenizers")
#: of the processor, which does not count what other programs take
_TIME = ("import time, torch; start = time.process_time(); import veneer.peft; "
         "print(time.process_time() - start)")


@pytest.mark.parametrize("path", PATHS)
def test_names_are_where_they_are_in_peft(path: str) -> None:
    mine = importlib.import_module(f"veneer.peft.{path}".rstrip("."))
    assert [name for name in PATHS[path] if not hasattr(mine, name)] == []
    pytest.importorskip("peft")
    if path == "tuners.lora.corda":
        pytest.importorskip("attr", reason="PEFT's module needs it and PEFT does not ask for it")
    if path == "tuners.lora.bnb":
        pytest.importorskip("bitsandbytes", reason="PEFT's module needs it")
    other = importlib.import_module(f"peft.{path}".rstrip("."))
    assert [name for name in PATHS[path] if not hasattr(other, name)] == []


@pytest.mark.parametrize("path", PATHS)
def test_each_path_can_be_the_first_import(path: str) -> None:
    """No import works only after another: all start at `veneer.peft`, whose order must hold."""
    module = importlib.import_module(f"veneer.peft.{path}".rstrip("."))
    for name in PATHS[path]:
        found = getattr(module, name)
        assert getattr(ours, name, found) is found, name


def test_all_is_pefts_all_but_what_is_outside_the_family() -> None:
    theirs = pytest.importorskip("peft")
    assert set(theirs.__all__) == (set(ours.__all__) - {"CordaConfig"}) | OUTSIDE
    assert not OUTSIDE & set(ours.__all__)
    assert [name for name in ours.__all__ if not hasattr(ours, name)] == []
    assert ours.__version__ == theirs.__version__


def test_names_outside_the_family_say_where_they_are() -> None:
    with pytest.raises(AttributeError, match=r"veneer.peft has no IA3Config: Veneer has the LoRA family .* `from peft "
                                             "import IA3Config`"):
        ours.IA3Config  # noqa: B018
    assert getattr(ours, "IA3Config", "absent") == "absent"
    with pytest.raises(ImportError, match=r"cannot import name 'IA3Config' from 'veneer\.peft'"):
        from veneer.peft import IA3Config  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'LoraConfg'; did you mean 'LoraConfig'"):
        ours.LoraConfg  # noqa: B018
    assert not hasattr(ours, "nothing_of_the_kind")


def test_modules_are_attributes_after_the_import_of_the_package() -> None:
    paths = [path for path in PATHS if path]
    code = f"""
import veneer.peft as peft
for path in {paths!r}:
    found = peft
    for part in path.split("."):
        found = getattr(found, part)
    assert found.__name__ == "veneer.peft." + path, path
try:
    peft.utils.nothing
except AttributeError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "module 'veneer.peft.utils' has no attribute 'nothing'"


def test_what_is_installed_is_what_peft_says() -> None:
    mine, theirs = importlib.import_module("veneer.peft.import_utils"), pytest.importorskip("peft.import_utils")
    said = {name: getattr(mine, name)() for name in PATHS["import_utils"]}
    assert said == {name: getattr(theirs, name)() for name in said}


def test_no_modules_of_dora() -> None:
    dora = importlib.import_module("veneer.peft.tuners.lora.dora")
    with pytest.raises(AttributeError, match=r"no DoraLinearLayer: .* layer.use_dora\[adapter\] says"):
        dora.DoraLinearLayer  # noqa: B018
    assert not hasattr(dora, "anything")


def test_importing_imports_no_optional_library() -> None:
    code = f"import sys, veneer.peft; print([name for name in {OPTIONAL!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_importing_is_quick(tmp_path: Path) -> None:
    times = []
    compiled = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}  # as for anybody from the second time on
    compiled.pop("PYTHONDONTWRITEBYTECODE", None)
    for _ in range(4):
        found = subprocess.run([sys.executable, "-c", _TIME], capture_output=True, text=True, check=True, env=compiled)
        times.append(float(found.stdout))
        if times[-1] <= 0.3:
            break
    assert min(times) <= 0.3


def test_tables_of_targets_are_pefts_and_can_be_added_to() -> None:
    mine = importlib.import_module("veneer.peft.utils.constants")
    theirs = pytest.importorskip("peft.utils.constants")
    tables = [name for name in mine.__all__ if name.startswith("TRANSFORMERS_MODELS_TO")]
    assert len(tables) == 7
    for name in tables:
        assert getattr(mine, name) == getattr(theirs, name)
    from torch import nn

    class Own(nn.Sequential):
        config = {"model_type": "own_kind"}  # noqa: RUF012

    mine.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["own_kind"] = ["0"]
    try:
        model = ours.get_peft_model(Own(nn.Linear(4, 4)), ours.LoraConfig(r=2))
        assert model.peft_config["default"].target_modules == {"0"}
        with pytest.raises(ValueError, match="Please specify `target_modules`"):
            ours.get_peft_model(Own(nn.Linear(4, 4)), ours.LoHaConfig(r=2))
    finally:
        del mine.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["own_kind"]


def test_small_constants_are_pefts() -> None:
    mine = importlib.import_module("veneer.peft.utils.constants")
    theirs = pytest.importorskip("peft.utils.constants")
    for name in mine.__all__:
        if not name.startswith("TRANSFORMERS_"):
            assert getattr(mine, name) == getattr(theirs, name), name
    prefixes = importlib.import_module("veneer.peft.mapping").PEFT_TYPE_TO_PREFIX_MAPPING
    others = importlib.import_module("peft.mapping").PEFT_TYPE_TO_PREFIX_MAPPING
    assert prefixes == {kind: others[kind.value] for kind in prefixes}
