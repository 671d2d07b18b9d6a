"""The configs against PEFT's: fields, order, defaults, dicts, files, and what each of them refuses or warns of."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types
from typing import Any

import pytest

from veneer.method import VeneerError, VeneerWarning
from veneer.peft import errors
from veneer.peft.config import PeftConfig, PeftConfigMixin, config_class
from veneer.peft.errors import NotInVeneerError
from veneer.peft.family_configs import (
    AdaLoraConfig,
    LoHaConfig,
    LoKrConfig,
    RandLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)
from veneer.peft.lora_config import CordaConfig, EvaConfig, LoftQConfig, LoraConfig, LoraGAConfig, LoraRuntimeConfig
from veneer.peft.saving import load_peft_weights
from veneer.peft.types import FAMILY, PeftType, TaskType

peft = pytest.importorskip("peft", reason="the configs are compared with PEFT's")
theirs_lora = pytest.importorskip("peft.tuners.lora.config")

FAMILY_CONFIGS = [LoraConfig, AdaLoraConfig, LoHaConfig, LoKrConfig, VBLoRAConfig, RandLoraConfig, VeraConfig]
INNER = [LoftQConfig, EvaConfig, CordaConfig, LoraGAConfig, LoraRuntimeConfig]
#: what a config must have to be made at all
NEEDED: dict[type, dict[str, Any]] = {AdaLoraConfig: {"total_step": 100}}
LISTS = {"target_modules": ["v", "q"], "task_type": "CAUSAL_LM", "modules_to_save": ["head"]}


def theirs(kind: type) -> type:
    return getattr(peft, kind.__name__, None) or getattr(theirs_lora, kind.__name__)


# -- the same shape as PEFT's -------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [*FAMILY_CONFIGS, *INNER, PeftConfig], ids=lambda kind: kind.__name__)
def test_fields_order_and_defaults(kind):
    assert peft.__version__.startswith("0.21"), "these are the fields of 0.21"

    def seen(cls):
        return [(f.name, f.init, f.default_factory().__dict__ if f.name == "runtime_config" else
                 f.default if f.default_factory is dataclasses.MISSING else f.default_factory())
                for f in dataclasses.fields(cls)]

    assert seen(kind) == seen(theirs(kind))


@pytest.mark.parametrize("kind", FAMILY_CONFIGS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("options", [{}, LISTS, {"target_modules": ".*q", "inference_mode": True}],
                         ids=["bare", "lists", "regex"])
def test_the_same_dict(kind, options):
    mine, other = (cls(**NEEDED.get(kind, {}), **options).to_dict() for cls in (kind, theirs(kind)))
    assert mine.pop("peft_version") is None  # that is of PEFT's own files
    other.pop("peft_version")
    assert mine == other
    assert "runtime_config" not in mine
    assert kind(**NEEDED.get(kind, {})).peft_type == other["peft_type"]


def test_positional_construction():
    assert LoraConfig("CAUSAL_LM", None, None, None, "base", None, False, 4, ["q"]).to_dict() == {
        **LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="base", r=4, target_modules=["q"]).to_dict()}


@pytest.mark.parametrize("kind", FAMILY_CONFIGS, ids=lambda kind: kind.__name__)
def test_a_file_goes_both_ways(kind, tmp_path):
    options = {**NEEDED.get(kind, {}), **LISTS}
    config = kind(**options)
    config.save_pretrained(tmp_path / "mine")
    text = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert text["target_modules"] == ["q", "v"]
    assert list(text) == sorted(text)
    for reader in (PeftConfig, kind, LoraConfig):
        again = reader.from_pretrained(tmp_path / "mine")
        assert type(again) is kind
        assert again == config
    assert type(peft.PeftConfig.from_pretrained(str(tmp_path / "mine"))) is theirs(kind)
    theirs(kind)(**options).save_pretrained(str(tmp_path / "theirs"))
    back = PeftConfig.from_pretrained(tmp_path / "theirs")
    assert back.peft_version == peft.__version__
    assert {**back.to_dict(), "peft_version": None} == config.to_dict()


def test_sub_configs_survive_a_file(tmp_path):
    pairs = [(LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=3.0)), "eva_config"),
             (LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm")), "corda_config"),
             (LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(stable_gamma=8)), "lora_ga_config"),
             (LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(2, 3)), "loftq_config")]
    for number, (config, name) in enumerate(pairs):
        config.save_pretrained(tmp_path / str(number))
        again = PeftConfig.from_pretrained(tmp_path / str(number))
        assert getattr(again, name) == getattr(config, name)
        assert again == config
    assert pairs[3][0].loftq_config == {"loftq_bits": 2, "loftq_iter": 3}


def test_subfolder_auto_mapping_and_what_has_no_effect(tmp_path):
    with pytest.warns(VeneerWarning, match="push_to_hub has no effect"):
        LoraConfig(r=3).save_pretrained(tmp_path / "a" / "b", auto_mapping_dict={"x": 1}, push_to_hub=True)
    found = PeftConfig.from_pretrained(tmp_path / "a", subfolder="b", revision="main")
    assert (found.r, found.auto_mapping) == (3, {"x": 1})
    assert PeftConfig._get_peft_type(tmp_path / "a", subfolder="b") == "LORA"
    with pytest.warns(VeneerWarning, match="nonsense has no effect"):
        PeftConfig.from_pretrained(tmp_path / "a" / "b", nonsense=1)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(AssertionError, match="needs a directory"):
        LoraConfig().save_pretrained(file)


def test_settings_fill_in_what_a_file_leaves_out(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3}')
    found = PeftConfig.from_pretrained(tmp_path, r=9, lora_alpha=5)
    assert (found.r, found.lora_alpha) == (3, 5)


# -- files ---------------------------------------------------------------------------------------------------
def test_unknown_keys_are_refused_where_they_say_something(tmp_path):
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "r": 3, "new_thing": None, "other": False, "third": []}))
    assert PeftConfig.from_pretrained(tmp_path).r == 3
    file.write_text(json.dumps({"peft_type": "LORA", "use_rslra": True}))
    with pytest.raises(VeneerError, match=r"LoraConfig has no setting 'use_rslra' \(= True\); did you mean "
                                          r"'use_rslora'\?"):
        PeftConfig.from_pretrained(tmp_path)


def test_runtime_config_of_a_file_is_left_out(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "runtime_config": {"a": 1}}')
    with pytest.warns(UserWarning, match="runtime_config"):
        assert PeftConfig.from_pretrained(tmp_path).runtime_config == LoraRuntimeConfig()


@pytest.mark.parametrize(("text", "says"), [("[1]", "holds a list"), ("{", "is not JSON")])
def test_a_file_that_is_none(tmp_path, text, says):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        PeftConfig.from_pretrained(tmp_path)


def test_other_methods_are_named(tmp_path):
    with pytest.raises(NotInVeneerError, match=r"'PREFIX_TUNING': Veneer has the LoRA family \(LORA, .*original peft"):
        PeftConfig.from_peft_type(peft_type="PREFIX_TUNING")
    with pytest.raises(VeneerError, match="unknown peft_type 'LROA'; did you mean 'LORA'"):
        config_class("LROA")
    assert issubclass(NotInVeneerError, NotImplementedError)
    assert issubclass(NotInVeneerError, ValueError)
    assert [config_class(kind).__name__ for kind in FAMILY] == [
        "LoraConfig", "AdaLoraConfig", "LoHaConfig", "LoKrConfig", "VeraConfig", "VBLoRAConfig", "RandLoraConfig"]
    assert {kind.value for kind in PeftType} == {kind.value for kind in peft.PeftType}
    assert [task.value for task in TaskType] == [task.value for task in peft.TaskType]
    assert type(PeftConfig.from_peft_type(r=3, peft_type="LOHA")) is LoHaConfig
    assert type(LoKrConfig.from_peft_type(r=3)) is LoKrConfig


def test_the_hub_is_asked_only_for_what_is_no_directory(tmp_path, monkeypatch):
    asked = []

    def download(repo, name, **options):
        asked.append((repo, name, options))
        if repo == "missing/repo":
            raise OSError("404")
        return str(tmp_path / name)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=download))
    LoraConfig(r=5).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained("some/repo", subfolder="x", revision="v1", token="t").r == 5
    assert asked == [("some/repo", "adapter_config.json", {"subfolder": "x", "revision": "v1", "token": "t"})]
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at 'missing/repo'.*404"):
        PeftConfig.from_pretrained("missing/repo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftConfig.from_pretrained(tmp_path / "empty")
    for path, says in [(tmp_path / "emtpy", "there is no folder '.*emtpy'; did you mean 'empty'"),
                       ("./nope", r"there is no folder '\./nope' below '/"),
                       ("a/b/c", "there is no folder 'a/b/c' below '/"),
                       (tmp_path / "adapter_config.json", r"adapter_config\.json' is a file; give the folder")]:
        with pytest.raises(ValueError, match=says):
            PeftConfig.from_pretrained(path)
        with pytest.raises(VeneerError, match=says):
            load_peft_weights(path)
    assert len(asked) == 2
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        PeftConfig.from_pretrained("some/repo")


# -- validation ----------------------------------------------------------------------------------------------
BAD: list[tuple[type, dict[str, Any], type[Exception], str]] = [
    (LoraConfig, {"task_type": "CAUSAL"}, ValueError, "Invalid task type 'CAUSAL'; did you mean 'CAUSAL_LM'"),
    (LoraConfig, {"target_modules": "q", "layers_to_transform": [1]}, ValueError,
     "`layers_to_transform` cannot be used when `target_modules` is a str"),
    (LoraConfig, {"target_modules": "q", "layers_pattern": "h"}, ValueError,
     "`layers_pattern` cannot be used when `target_modules` is a str"),
    (LoraConfig, {"target_modules": ["q"], "layers_pattern": "h"}, ValueError, "`layers_to_transform` must be too"),
    (LoHaConfig, {"target_modules": ["q"], "layers_pattern": "h"}, ValueError, "`layers_to_transform` must be too"),
    (LoKrConfig, {"target_modules": ["q"], "layers_pattern": "h"}, ValueError, "`layers_to_transform` must be too"),
    (VBLoRAConfig, {"target_modules": ["q"], "layers_pattern": "h"}, ValueError, "`layers_to_transform` must be too"),
    (VeraConfig, {"target_modules": ["q"], "layers_pattern": "h"}, ValueError, "`layers_to_transform` must be too"),
    (LoraConfig, {"target_parameters": "w"}, TypeError, "must be a list of strings or None, got 'w'"),
    (LoraConfig, {"init_lora_weights": "loftq"}, ValueError, "needs `loftq_config`"),
    (LoraConfig, {"lora_bias": True, "use_dora": True}, ValueError, "lora_bias=True is not supported for DoRA"),
    (LoraConfig, {"lora_bias": True, "init_lora_weights": "gaussian"}, ValueError, "init_lora_weights=True or False"),
    (LoraConfig, {"eva_config": 3}, TypeError, "a EvaConfig, a dict or None is expected, got 3"),
    (EvaConfig, {"rho": 0.5}, ValueError, "`rho` must be >= 1.0, got 0.5"),
    (EvaConfig, {"tau": 1.5}, ValueError, "`tau` must be between 0.0 and 1.0, got 1.5"),
    (AdaLoraConfig, {}, ValueError, "needs `total_step`"),
    (AdaLoraConfig, {"total_step": 0}, ValueError, "needs `total_step`"),
    (AdaLoraConfig, {"total_step": 9, "use_dora": True}, ValueError, "does not support DoRA"),
    (AdaLoraConfig, {"total_step": 9, "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, ValueError,
     "does not support LoftQ"),
    (AdaLoraConfig, {"total_step": 9, "orth_reg_weight": -1}, ValueError, "`orth_reg_weight` must be at least 0"),
    (AdaLoraConfig, {"total_step": 9, "tinit": 5, "tfinal": 4}, ValueError, "no steps are left to cut ranks in"),
    (AdaLoraConfig, {"total_step": 9, "target_modules": "q", "layers_to_transform": 1}, ValueError,
     "`layers_to_transform` cannot be used"),
]


@pytest.mark.parametrize(("kind", "options", "error", "says"), BAD,
                         ids=[f"{k.__name__}-{'-'.join(o)}" for k, o, *_ in BAD])
def test_what_cannot_be_is_refused_as_in_peft(kind, options, error, says):
    with pytest.raises(error, match=says):
        kind(**options)
    with pytest.raises((error, ImportError)):  # PEFT wants scipy for LoftQ first
        theirs(kind)(**options)


@pytest.mark.parametrize(("options", "says"), [
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens=.*live only after certain tokens"),
    ({"use_qalora": True}, "use_qalora=True"), ({"arrow_config": {"top_k": 2}}, "arrow_config"),
    ({"kasa_config": {"beta": 1}}, "kasa_config"), ({"monteclora_config": {"x": 1}}, "monteclora_config"),
    ({"velora_config": {"x": 1}}, "velora_config"), ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ({"megatron_config": {"a": 1}}, "megatron_config"), ({"init_lora_weights": "mica"}, "init_lora_weights='mica'"),
])
def test_what_veneer_does_not_have_is_refused_by_name(options, says):
    with pytest.raises(NotInVeneerError, match=says):
        LoraConfig(**options)


def test_unknown_settings_and_starts():
    with pytest.raises(VeneerError, match="Unknown initialization init_lora_weights='pisa'; did you mean 'pissa'"):
        LoraConfig(init_lora_weights="pisa")
    with pytest.raises(VeneerError, match="did you mean 'pissa_niter_4'"):
        LoraConfig(init_lora_weights="pissa_niter_x")
    with pytest.raises(VeneerError, match="EvaConfig has no setting 'roh'; did you mean 'rho'"):
        LoraConfig(init_lora_weights="eva", eva_config={"roh": 2})
    assert [LoraConfig(init_lora_weights=v).start for v in (True, False, None, "Gaussian", "pissa_niter_16")] == [
        "True", "False", "False", "gaussian", "pissa_niter_16"]


@pytest.mark.parametrize(("kind", "options", "says"), [
    (LoraConfig, {"loftq_config": {"loftq_bits": 4}}, "`loftq_config` specified but will be ignored"),
    (LoraConfig, {"eva_config": EvaConfig()}, "`eva_config` specified but will be ignored"),
    (LoraConfig, {"corda_config": CordaConfig()}, "`corda_config` specified but will be ignored"),
    (LoraConfig, {"init_lora_weights": "eva"}, r"taking EvaConfig\(\)"),
    (LoraConfig, {"init_lora_weights": "corda"}, r"taking CordaConfig\(\)"),
    (LoraConfig, {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q": 2}}, "use_rslora with rank"),
    (AdaLoraConfig, {"total_step": 9, "r": 4}, "`r` .* not used by AdaLoRA"),
    (VeraConfig, {"save_projection": False}, "save_projection=False"),
    (RandLoraConfig, {"save_projection": False}, "save_projection=False"),
])
def test_warnings_of_peft(kind, options, says):
    with pytest.warns(UserWarning, match=says) as seen:
        kind(**options)
    assert [warning.filename for warning in seen] == [__file__]
    other = {key: getattr(theirs_lora, type(value).__name__)() if dataclasses.is_dataclass(value) else value
             for key, value in options.items()}
    with pytest.warns(UserWarning, match="[a-z]"):
        theirs(kind)(**other)


def test_what_a_warning_leaves_behind():
    with pytest.warns(UserWarning, match="ignored"):
        assert LoraConfig(loftq_config={"loftq_bits": 4}).loftq_config == {}
    with pytest.warns(UserWarning, match="EvaConfig"):
        assert LoraConfig(init_lora_weights="eva").eva_config == EvaConfig()


def test_lists_become_sets():
    config = LoraConfig(target_modules=["q", "q"], exclude_modules=["v"])
    assert (config.target_modules, config.exclude_modules) == ({"q"}, {"v"})
    assert LoraConfig(target_modules="q").target_modules == "q"
    assert not config.is_prompt_learning
    assert not config.is_adaption_prompt
    assert PeftConfigMixin.check_kwargs(a=1) == {"a": 1}


def test_nothing_heavy_is_imported():
    """In a process of its own: the modules of configs and translation bring in none of the optional libraries."""
    code = ("import sys, veneer.peft.translate, veneer.peft.family_configs\n"
            "heavy = ['transformers', 'bitsandbytes', 'triton', 'peft', 'accelerate', 'huggingface_hub']\n"
            "print([name for name in heavy if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_error_is_a_veneer_error():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__module__ == errors.__name__]
    assert len(kinds) >= 3
    assert all(issubclass(kind, VeneerError) for kind in kinds)
