"""What a config becomes: names against PEFT's own matching, and every option of every config in the rules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import veneer
from veneer import AdaLoRA, DoRA, Full, LoHa, LoKr, LoRA, RandLoRA, Rows, VBLoRA, VeRA
from veneer.attached import attached
from veneer.inits import CorDA, KaimingBoth, LoftQ, LoRAGA, TorchInit
from veneer.inspect.summary import adapters
from veneer.io.dialects.hf_types import file_type
from veneer.io.records import base_map, base_weights
from veneer.method import VeneerError, VeneerWarning
from veneer.peft import remembered
from veneer.peft.architectures import default_targets, fused_experts
from veneer.peft.config import PeftConfig
from veneer.peft.errors import NoMatchingPeftModuleError, NotInVeneerError, UnsupportedLayerError
from veneer.peft.family_configs import (
    AdaLoraConfig,
    LoHaConfig,
    LoKrConfig,
    RandLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)
from veneer.peft.lora_config import CordaConfig, LoraConfig, LoraGAConfig, LoraRuntimeConfig
from veneer.peft.targets import inspect_matched_modules, settle_targets
from veneer.peft.translate import Translation, translate
from veneer.peft.types import FAMILY
from veneer.statistics import Statistics

from . import nets

peft = pytest.importorskip("peft", reason="matching is compared with PEFT's")
constants = pytest.importorskip("peft.utils.constants")

QUIET = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


def theirs(build: Callable[[], nn.Module], kind: str, options: dict[str, Any]) -> Any:
    """PEFT's tuner on a fresh model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(build(), getattr(peft, kind)(**options)).base_model


def changed(found: Translation) -> dict[str, Any]:
    return {name: method for name, method in found.rules.items() if method is not None}


def only(found: Translation) -> Any:
    """The one method of all targets."""
    (method,) = set(changed(found).values())
    return method


# -- the same names as PEFT ----------------------------------------------------------------------------------
NAMES: list[tuple[str, Callable[[], nn.Module], dict[str, Any]]] = [
    ("list", nets.decoder, {"target_modules": ["q_proj", "v_proj"]}),
    ("whole names", nets.decoder, {"target_modules": ["model.layers.0.mlp.up_proj", "layers.1.self_attn.q_proj"]}),
    ("regex", nets.decoder, {"target_modules": r".*\.[01]\.self_attn\.(q|k)_proj"}),
    ("all-linear", nets.decoder, {"target_modules": "All-Linear"}),
    ("none", nets.decoder, {}),
    ("embedding", nets.decoder, {"target_modules": ["embed_tokens", "o_proj"]}),
    ("exclude list", nets.decoder, {"target_modules": "all-linear", "exclude_modules": ["gate_proj", "0.mlp.up_proj"]}),
    ("exclude regex", nets.decoder, {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.2\..*"}),
    ("one layer", nets.decoder, {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    ("layers", nets.decoder, {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    ("no layers", nets.decoder, {"target_modules": ["q_proj"], "layers_to_transform": []}),
    ("layers and pattern", nets.decoder,
     {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "layers"}),
    ("layers and patterns", nets.conv1d,
     {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": ["blocks", "h"]}),
    ("saved", nets.decoder, {"target_modules": "all-linear", "modules_to_save": ["mlp"]}),
    ("gpt2 none", nets.conv1d, {}), ("gpt2 all-linear", nets.conv1d, {"target_modules": "all-linear"}),
    ("gpt2 c_proj", nets.conv1d, {"target_modules": ["mlp.c_proj"]}),
    ("bert none", nets.encoder, {}), ("bert all-linear", nets.encoder, {"target_modules": "all-linear"}),
    ("bert all-linear of a classifier", nets.encoder, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert regex", nets.encoder, {"target_modules": r"bert\.encoder.*(query|dense)"}),
    ("t5 none", nets.encoder_decoder, {}), ("t5 all-linear", nets.encoder_decoder, {"target_modules": "all-linear"}),
    ("t5 layers", nets.encoder_decoder, {"target_modules": ["q"], "layers_to_transform": [1]}),
    ("vit list", nets.vision, {"target_modules": ["q_proj", "projection"]}),
    ("vit all-linear", nets.vision, {"target_modules": "all-linear"}),
    ("mixtral list", nets.experts, {"target_modules": ["q_proj"]}),
    ("mixtral experts by their old names", nets.experts, {"target_modules": ["w1", "w2", "w3", "k_proj"]}),
    ("mixtral gate", nets.experts, {"target_modules": ["gate", "o_proj"]}),
    ("mixtral all-linear", nets.experts, {"target_modules": "all-linear"}),
    ("mixtral regex", nets.experts, {"target_modules": r".*\.(q_proj|w[123])"}),
    ("mixtral parameters", nets.experts, {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    ("llama parameters", nets.decoder, {"target_modules": ["q_proj"], "target_parameters": ["0.mlp.up_proj.weight"]}),
]


@QUIET
@pytest.mark.parametrize(("build", "options"), [case[1:] for case in NAMES], ids=[case[0] for case in NAMES])
def test_the_same_names_as_peft(build, options):
    other = theirs(build, "LoraConfig", options)
    found = translate(build(), LoraConfig(**options))
    assert sorted(found.modules) == sorted(other.targeted_module_names)
    assert sorted(found.parameters) == sorted(other.targeted_parameter_names)
    resolved = other.peft_config["default"]
    assert found.config.target_modules == resolved.target_modules
    assert set(found.config.target_parameters or ()) == set(resolved.target_parameters or ())
    assert found.config.rank_pattern == resolved.rank_pattern
    assert found.config.fan_in_fan_out == resolved.fan_in_fan_out
    ranks = {name: part["default"].weight.shape[0] for name, part in
             ((name, getattr(module, "lora_A", None)) for name, module in other.model.named_modules())
             if part and ".base_layer" not in name and name in found.modules}
    mine = {name.removesuffix(".weight"): method.rank for name, method in changed(found).items()
            if isinstance(method, LoRA)}
    assert {name: mine[name] for name in ranks} == ranks


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig, VeraConfig, VBLoRAConfig, RandLoraConfig, AdaLoraConfig],
                         ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
                                     {"target_modules": "all-linear"}], ids=["none", "list", "all-linear"])
def test_the_family_matches_as_peft(kind, options):
    options = dict(options)
    if kind is AdaLoraConfig:
        options["total_step"] = 50
    if kind is VBLoRAConfig:
        options["vector_length"] = 4
    other = theirs(nets.decoder, kind.__name__, options)
    found = translate(nets.decoder(), kind(**options))
    assert list(found.modules) == other.targeted_module_names
    assert found.config.target_modules == other.peft_config["default"].target_modules


def test_the_tables_of_architectures():
    tables = {"LORA": "LORA", "LOHA": "LOHA", "LOKR": "LOKR", "RANDLORA": "RANDLORA", "VERA": "VERA",
              "VBLORA": "VBLORA", "ADALORA": "ADALORA"}
    for kind in FAMILY:
        table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{tables[kind.value]}_TARGET_MODULES_MAPPING")
        for name, targets in table.items():
            found = default_targets(kind, name)
            assert found == (targets if isinstance(targets, str) else set(targets)), (kind, name)
        assert default_targets(kind, "nothing") is None
        assert default_targets(kind, "vit") is None


def test_the_table_of_experts():
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    for name, pattern in conversion._MODEL_TO_CONVERSION_PATTERN.items():
        assert dict(fused_experts(name)) == conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, {}), name


def test_matched_modules_are_listed():
    config = LoraConfig(target_modules=["q_proj"], exclude_modules=["0.self_attn.q_proj"])
    found = inspect_matched_modules(nets.decoder(), config)
    assert found["matched"] == [f"model.layers.{i}.self_attn.q_proj" for i in (1, 2)]
    assert "model.layers.0.self_attn.q_proj" in found["unmatched"]


def test_a_second_adapter_is_matched_on_the_bare_model():
    model = nets.decoder()
    first = translate(model, LoraConfig(target_modules="all-linear"))
    veneer.attach(model, first.rules, "one")
    second = translate(model, LoraConfig(target_modules="all-linear"))
    assert second.modules == first.modules
    assert second.rules == first.rules
    veneer.attach(model, second.rules, "two")


def test_long_lists_become_short():
    config = LoraConfig(target_modules=[f"model.layers.{i}.self_attn.{k}_proj" for i in range(12) for k in "qv"])
    model = nets.decoder(layers=12)
    settle_targets(model, base_map(model, base_weights(model)), config)
    assert config.target_modules == {"q_proj", "v_proj"}


# -- nothing fits --------------------------------------------------------------------------------------------
NOTHING: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["q_porj"]}, r"Target modules \{'q_porj'\} not found in the base model; did you mean 'q_proj' "
     r"\(3 like it\)\?$"),
    ({"target_modules": r".*q_porj"}, r"Target modules '.*q_porj' not found in the base model; did you mean 'q_proj'"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [9]},
     r"'model.layers.0.self_attn.q_proj' and 2 more fit but for their layer's number. layers_to_transform is \[9\]"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "blocks"},
     "layers_pattern is 'blocks'"),
    ({"target_modules": ["q_proj"], "exclude_modules": ".*"}, "All modules were excluded"),
    ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
     "No modules were targeted for adaptation .*'model.layers.0.self_attn.q_proj' and 2 more would fit"),
    ({"target_modules": ["q_porj"], "exclude_modules": ["v_proj"]},
     r"No modules were targeted for adaptation .* none fits, with 3 excluded; did you mean 'q_proj' \(3 like it\)\?$"),
    ({"target_modules": "q_proj"}, r"Target modules 'q_proj' not found in the base model; a string is a regular "
     r"expression for the whole name: write \['q_proj'\], a list, to hit 'model\.layers\.0\.self_attn\.q_proj' and 2 "
     r"more\.$"),
    ({"target_modules": ["zzz"]}, r"not found in the base model\. Names of layers that can be adapted end in "
     r"'embed_tokens', 'q_proj', .*'lm_head'\.$"),
    ({"target_modules": []}, r"No `target_modules` passed and no `target_parameters` either\. Names of layers .*\.$"),
    ({"target_modules": [], "target_parameters": ["q_proj.wieght"]},
     "No `target_modules` passed but also no `target_parameters` found.*did you mean 'weight'"),
]


@pytest.mark.parametrize(("options", "says"), NOTHING, ids=[says[:30] for _, says in NOTHING])
def test_where_nothing_fits(options, says):
    with pytest.raises(NoMatchingPeftModuleError, match=says):
        translate(nets.decoder(), LoraConfig(**options))
    with pytest.raises(ValueError, match="odules"):
        theirs(nets.decoder, "LoraConfig", options)


class Words(nn.Module):
    """Of no library."""

    def __init__(self):
        super().__init__()
        self.words, self.fc1, self.act, self.fc2 = nn.Embedding(9, 4), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)


@pytest.mark.parametrize(("config", "says"), [
    (LoraConfig(target_modules=["zzz"]), r"Names of layers that can be adapted end in 'words', 'fc1', 'fc2'\.$"),
    (LoraConfig(target_modules="fc"), r"; did you mean 'fc[12]' \(1 like it\)\?$"),
    (LoraConfig(target_modules=["zzz"], exclude_modules=["fc1"]), r"none fits, with 1 excluded\.$"),
    (VeraConfig(target_modules=["zzz"]), r"end in 'fc1', 'fc2'\.$"),
    (LoHaConfig(target_modules=[]), r"^No `target_modules` passed\. Names of layers that can be adapted end in 'fc"),
    (LoraConfig(), r"none are known for a model without a model_type in its config\. Names of layers that can be "
                   r"adapted end in 'words', 'fc1', 'fc2'; \"all-linear\" is every linear layer$"),
])
def test_the_layers_of_ones_own_model_are_named(config, says):
    with pytest.raises(ValueError, match=says):
        translate(Words(), config)
    with pytest.raises(ValueError, match="has no layer that LORA can adapt"):
        translate(nn.Sequential(nn.LayerNorm(3)), LoraConfig(target_modules=["zzz"]))


def test_not_all_names_of_many_are_listed():
    many = nn.ModuleDict({f"part_{i}": nn.Linear(2, 2) for i in range(14)})
    with pytest.raises(NoMatchingPeftModuleError, match=r"'part_0', .*, 'part_11' and 2 more\.$"):
        translate(many, LoraConfig(target_modules=["zzz"]))


def test_an_unknown_architecture():
    with pytest.raises(ValueError, match=r"Please specify `target_modules` or `target_parameters` in `peft_config`: "
                                         r"none are known for model_type 'vit'.*bert.*all-linear"):
        translate(nets.vision(), LoraConfig())
    with pytest.raises(ValueError, match=r"Please specify `target_modules` in `peft_config`.*without a model_type"):
        translate(nn.Sequential(nn.Linear(3, 3)), LoHaConfig())
    assert translate(nets.vision(), LoraConfig(target_parameters=["q_proj.weight"])).modules == ()


@pytest.mark.parametrize(("options", "kind", "says"), [
    ({"exclude_modules": ["v_porj"]}, UserWarning, r"exclude_modules=\{'v_porj'\}.*did you mean 'v_proj'"),
    ({"target_modules": ["nothing"], "target_parameters": ["q_proj.weight"]}, RuntimeWarning,
     "target_modules=.*no module was matched"),
    ({"target_parameters": ["q_proj.wieght"]}, RuntimeWarning, "target_parameters=.*did you mean 'weight'"),
    ({"rank_pattern": {"q_porj": 2}}, RuntimeWarning, r"rank_pattern: \['q_porj'\] did not match .*'q_proj'"),
    ({"alpha_pattern": {"k_proj": 2}}, RuntimeWarning, r"alpha_pattern: \['k_proj'\] did not match"),
])
def test_settings_that_hit_nothing_are_told(options, kind, says):
    with pytest.warns(kind, match=says) as seen:
        translate(nets.decoder(), LoraConfig(**{"target_modules": ["q_proj"], **options}))
    assert [warning.filename for warning in seen] == [__file__]


@pytest.mark.parametrize(("config", "error", "says"), [
    (LoraConfig(target_modules=["norm"]), UnsupportedLayerError, r"'model.norm' \(LlamaRMSNorm\) is not supported by "
                                                                "LoRA, which adapts Linear, Embedding"),
    (LoraConfig(target_modules=r".*mlp"), UnsupportedLayerError, r"'model.layers.0.mlp' \(LlamaMLP\)"),
    (VeraConfig(target_modules=["embed_tokens"]), UnsupportedLayerError, "not supported by VeRA, which adapts Linear"),
    (LoraConfig(target_modules="("), VeneerError, r"target_modules: '\(' is no regular expression"),
    (LoraConfig(target_modules=["q_proj"], rank_pattern={"(": 2}), VeneerError, "rank_pattern: .* no regular expr"),
    (LoraConfig(target_modules=["embed_tokens"], lora_bias=True), VeneerError, "lora_bias=True is not supported"),
    (VBLoRAConfig(vector_length=5), VeneerError, "PEFT's VB-LoRA needs sizes that vector_length=5 divides"),
    (LoraConfig(target_modules=["q_proj"], r=0), VeneerError, "rank must be a whole number"),
    (LoraConfig(target_modules=["q_proj"], bias="lora"), NotInVeneerError, "Requested bias: 'lora' is not implemented; "
                                                                          "did you mean 'lora_only'"),
    (LoraConfig(target_modules=["q_proj"], target_parameters=["q_proj.weight"], r=2), VeneerError,
     "is named twice: target_modules gives it .* target_parameters gives it"),
    (LoraConfig(target_modules=["lm_head"], modules_to_save=["head"]), VeneerError, "named twice.*modules_to_save"),
    (AdaLoraConfig(total_step=9, use_rslora=True), VeneerError, "AdaLoRA has no use_rslora"),
], ids=lambda value: str(value)[:24] if isinstance(value, str) else None)
def test_what_cannot_be_adapted(config, error, says):
    with pytest.raises(error, match=says):
        translate(nets.decoder(), config)


@pytest.mark.parametrize("field", ["lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora"])
def test_parameters_take_no_options_of_layers(field):
    config = LoraConfig(target_modules=[], target_parameters=["down_proj"], **{field: 0.5 if "drop" in field else True})
    with pytest.raises(ValueError, match=rf"target_parameters .* does not work with {field}="):
        translate(nets.experts(), config)


def test_configs_of_others_are_refused():
    with pytest.raises(TypeError, match=r"adapter 'x': a config of veneer.peft is needed.*of the original peft"):
        translate(nets.decoder(), peft.LoraConfig(), "x")
    with pytest.raises(TypeError, match="got a dict"):
        translate(nets.decoder(), {"r": 3})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a PeftConfig does not say how to adapt"):
        translate(nets.decoder(), PeftConfig())


def test_the_config_given_is_not_changed():
    config = LoraConfig(target_modules="all-linear")
    before = copy.deepcopy(config)
    found = translate(nets.decoder(), config)
    assert config == before
    assert found.config is not config


# -- LoRA's options ------------------------------------------------------------------------------------------
def q(**options: Any) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["q_proj"], **options})


@pytest.mark.parametrize(("options", "method"), [
    ({}, LoRA(rank=8, alpha=8)), ({"r": 4}, LoRA(rank=4, alpha=8)), ({"lora_alpha": 32}, LoRA(alpha=32)),
    ({"lora_dropout": 0.1}, LoRA(alpha=8, dropout=0.1)),
    ({"use_rslora": True}, LoRA(alpha=8, rank_stabilized=True)),
    ({"use_dora": True}, DoRA(LoRA(alpha=8))), ({"lora_bias": True}, LoRA(alpha=8, bias=True)),
    ({"init_lora_weights": "Gaussian"}, LoRA(alpha=8, init="gaussian")),
    ({"init_lora_weights": "orthogonal"}, LoRA(alpha=8, init="orthogonal")),
    ({"init_lora_weights": "pissa"}, LoRA(alpha=8, init="pissa")),
    ({"init_lora_weights": "pissa_niter_16"}, LoRA(alpha=8, init="pissa_niter_16")),
    ({"init_lora_weights": "olora"}, LoRA(alpha=8, init="olora")),
    ({"init_lora_weights": False}, LoRA(alpha=8, init=KaimingBoth(), residual="none")),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2, "loftq_iter": 3}},
     LoRA(alpha=8, init=LoftQ(bits=2, iterations=3, packed=False))),
    ({"init_lora_weights": "pissa", "use_dora": True, "r": 3}, DoRA(LoRA(rank=3, alpha=8, init="pissa"))),
], ids=str)
def test_each_option_of_lora(options, method):
    config = q(**options)
    assert only(translate(nets.decoder(), config)) == method
    plain = only(translate(nets.decoder(), config, given=True))
    inner = plain.inner if isinstance(plain, DoRA) else plain
    assert (inner.init, inner.residual) == ("kaiming", "exact")


def test_ranks_and_alphas_of_some_modules():
    config = LoraConfig(target_modules=["q_proj", "k_proj"], rank_pattern={"q_proj": 2, r"layers\.1\..*": 3},
                        alpha_pattern={"^model.layers.0.self_attn.k_proj": 5})
    found = changed(translate(nets.decoder(), config))
    at = {name.removeprefix("model.layers.").removesuffix("_proj.weight"): method for name, method in found.items()}
    assert {name: (method.rank, method.alpha) for name, method in at.items()} == {
        "0.self_attn.q": (2, 8), "0.self_attn.k": (8, 5), "1.self_attn.q": (2, 8), "1.self_attn.k": (3, 8),
        "2.self_attn.q": (2, 8), "2.self_attn.k": (8, 8)}


def test_without_zeros_the_model_begins_changed():
    model = nets.decoder()
    inputs = nets.inputs_for(model)
    base = model(**inputs).logits
    veneer.attach(model, translate(model, q(init_lora_weights=False, r=4)).rules)
    assert not torch.equal(model(**inputs).logits, base)
    adapter = next(iter(adapters(model)["default"].weights.values()))
    assert 0.3 < adapter.B.abs().max() <= 1 / 2  # U(±1/√r), as nn.Linear(r, out)
    assert 0.2 < adapter.A.abs().max() <= 1 / 4  # U(±1/√in)


def test_an_embedding_starts_as_in_peft():
    found = changed(translate(nets.decoder(), LoraConfig(target_modules=["embed_tokens"], lora_dropout=0.5, r=2)))
    assert found == {"model.embed_tokens.weight": LoRA(rank=2, alpha=8, init="torch.nn.init.normal_")}
    nothing = LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)
    both = TorchInit(a="torch.nn.init.normal_", b="torch.nn.init.normal_")
    assert only(translate(nets.decoder(), nothing)) == LoRA(alpha=8, init=both, residual="none")


def test_experts_get_a_rank_for_each_of_the_parts_that_were_fused():
    found = changed(translate(nets.experts(), LoraConfig(target_modules=["w1", "w2", "w3"], r=3, lora_alpha=6)))
    ranks = {name.rpartition(".")[2]: (method.rank, method.alpha) for name, method in found.items()}
    assert ranks == {"gate_up_proj": (6, 12), "down_proj": (3, 6)}
    with pytest.raises(VeneerError, match=r"target_modules has w1 and not w3: .* gate_up_proj"):
        translate(nets.experts(), LoraConfig(target_modules=["w1"]))
    model = nets.experts()
    veneer.attach(model, translate(model, LoraConfig(target_modules="all-linear", r=2)).rules)
    model(**nets.inputs_for(model))


def test_eva_waits_for_its_data():
    with pytest.warns(UserWarning, match="EvaConfig"):
        config = q(init_lora_weights="eva")
    with pytest.warns(UserWarning, match=r"initialize_lora_eva_weights\(model, dataloader\)"):
        assert only(translate(nets.decoder(), config)) == LoRA(alpha=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        translate(nets.decoder(), config, given=True)


def statistics_for(model: nn.Module, kind: str) -> Statistics:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    tensors = {name: {kind: torch.eye(16), "count": torch.tensor(5)} for name in names}
    return Statistics(tensors, dict.fromkeys(names, kind))


@pytest.mark.parametrize(("start", "kind", "options", "init"), [
    ("corda", "covariance", {"corda_config": CordaConfig(corda_method="kpm")}, CorDA(mode="kpm")),
    ("lora_ga", "gradient", {"lora_ga_config": LoraGAConfig(stable_gamma=4)}, LoRAGA(gamma=4)),
])
def test_starts_from_what_was_collected(start, kind, options, init):
    model, config = nets.decoder(), q(init_lora_weights=start, r=2, **options)
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}' starts from data.*please run preprocess_"):
        translate(model, config)
    assert only(translate(model, config, given=True)) == LoRA(rank=2, alpha=8)
    collected = statistics_for(model, kind)
    remembered.remember(model, start, collected)
    found = translate(model, config)
    assert found.statistics is collected
    assert only(found) == LoRA(rank=2, alpha=8, init=init)
    veneer.attach(model, found.rules, statistics=found.statistics)
    remembered.forget(model, start)
    assert remembered.recall(model, start) is None


def test_memory_is_kept_beside_the_model():
    model = nets.decoder()
    keys = list(model.state_dict())
    remembered.remember(model, "corda", statistics_for(model, "covariance"))
    assert list(model.state_dict()) == keys
    assert remembered.recall(copy.deepcopy(model), "corda") is None
    with pytest.raises(VeneerError, match="nothing is remembered of kind 'cordo'; did you mean 'corda'"):
        remembered.recall(model, "cordo")
    before = len(remembered._KEPT)
    del model
    assert len(remembered._KEPT) < before


@pytest.mark.parametrize("options", [{"direction": "ArBr"}, {"scale": "unit"}])
def test_lora_ga_other_than_the_papers(options):
    model = nets.decoder()
    remembered.remember(model, "lora_ga", statistics_for(model, "gradient"))
    with pytest.raises(NotInVeneerError, match=f"LoraGAConfig: {next(iter(options))}="):
        translate(model, q(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(**options)))
    with pytest.raises(ValueError, match="needs `lora_ga_config`"):
        translate(model, q(init_lora_weights="lora_ga"))


def test_offload_has_no_effect():
    with pytest.warns(VeneerWarning, match="ephemeral_gpu_offload has no effect"):
        translate(nets.decoder(), q(runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True)))


@pytest.mark.parametrize(("build", "given", "fan", "says"), [
    (nets.conv1d, False, True, "set to False but the target module is `Conv1D`"),
    (nets.decoder, True, False, "set to True but the target module is `torch.nn.Linear`"),
])
@pytest.mark.parametrize("kind", [LoraConfig, VeraConfig, RandLoraConfig, AdaLoraConfig],
                         ids=lambda kind: kind.__name__)
def test_fan_in_fan_out_is_set_right(build, given, fan, says, kind):
    more = {"total_step": 9} if kind is AdaLoraConfig else {}
    with pytest.warns(UserWarning, match=says):
        found = translate(build(), kind(fan_in_fan_out=given, **more))
    assert found.config.fan_in_fan_out is fan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        translate(build(), kind(fan_in_fan_out=fan, **more))


# -- what is trained beside ----------------------------------------------------------------------------------
def test_biases():
    model = nets.encoder()
    names = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    rules = translate(model, LoraConfig(bias="all")).rules
    assert {name for name, method in rules.items() if method == Full()} == set(names)
    rules = translate(model, LoraConfig(bias="lora_only")).rules
    assert {name for name, method in rules.items() if method == Full()} == {
        name for name in names if "query" in name or "value" in name}
    rules = translate(model, LoraConfig()).rules
    assert Full() not in rules.values()
    veneer.attach(model, translate(model, LoraConfig(bias="all")).rules)
    assert all(isinstance(entry.method, Full) for name, entry in adapters(model)["default"].weights.items()
               if name.endswith(".bias"))


@pytest.mark.parametrize(("kind", "word"), [(VeraConfig, "vera_only"), (VBLoRAConfig, "vblora_only"),
                                            (RandLoraConfig, "randlora_only"), (AdaLoraConfig, "lora_only")])
def test_biases_of_the_family(kind, word):
    more = {AdaLoraConfig: {"total_step": 9}, VBLoRAConfig: {"vector_length": 4}}.get(kind, {})
    rules = translate(nets.encoder(), kind(bias=word, target_modules=["query"], **more)).rules
    assert {name for name, method in rules.items() if method == Full()} == {
        f"bert.encoder.layer.{i}.attention.self.query.bias" for i in (0, 1)}
    assert "bert.encoder.layer.0.attention.self.key.bias" in rules


def test_modules_trained_whole():
    rules = translate(nets.encoder(), LoraConfig(modules_to_save=["classifier", "score", "LayerNorm"])).rules
    mine = {name for name, method in rules.items() if method == Full()}
    assert {"classifier.weight", "classifier.bias", "bert.embeddings.LayerNorm.bias"} <= mine
    assert len(mine) == 2 + 2 * 5
    with pytest.warns(VeneerWarning, match="modules_to_save: no module's name ends in 'clasifier'; did you mean 'clas"):
        translate(nets.encoder(), LoraConfig(modules_to_save=["clasifier"]))
    with pytest.warns(VeneerWarning, match="'1' has buffers"):
        translate(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
                  LoraConfig(target_modules=["0"], modules_to_save=["1"]))


def test_no_targets_at_all():
    found = translate(nets.encoder(), LoraConfig(target_modules="dummy-target-modules", modules_to_save=["classifier"]))
    assert changed(found) == {"classifier.weight": Full(), "classifier.bias": Full()}
    assert translate(nets.encoder(), LoraConfig(target_modules="dummy-target-modules")).rules == {}


def test_rows_of_tokens():
    found = translate(nets.decoder(), q(trainable_token_indices=[1, 5]))
    assert changed(found)["model.embed_tokens.weight"] == Rows([1, 5])
    found = translate(nets.decoder(), q(trainable_token_indices={"embed_tokens": [2], "lm_head": [3]}))
    assert changed(found)["model.embed_tokens.weight"] == Rows([2])
    assert changed(found)["lm_head.weight"] == Rows([3])
    with pytest.raises(ValueError, match="'embed_tokns' of trainable_token_indices not found in the base model"):
        translate(nets.decoder(), q(trainable_token_indices={"embed_tokns": [2]}))
    with pytest.raises(ValueError, match=r"'embed_tokens' is in modules_to_save.*trainable_token_indices"):
        translate(nets.decoder(), q(trainable_token_indices={"embed_tokens": [2]}, modules_to_save=["embed_tokens"]))
    with pytest.raises(ValueError, match=r"'model.norm' has no rows to train"):
        translate(nets.decoder(), q(trainable_token_indices={"model.norm": [2]}))


def test_what_is_not_chosen_is_left_alone_on_purpose():
    """So that nothing is reported as forgotten: warnings of the engine are errors in these tests."""
    model = nets.conv1d()
    found = translate(model, LoraConfig(target_modules=["c_attn"], layers_to_transform=[0], fan_in_fan_out=True))
    assert found.rules["transformer.h.1.attn.c_attn.weight"] is None
    veneer.attach(model, found.rules)


# -- ties ----------------------------------------------------------------------------------------------------
TIED = pytest.mark.filterwarnings("ignore:'model.embed_tokens' and 'lm_head' are one tied:veneer.method.VeneerWarning")


@pytest.mark.parametrize(("options", "says"), [
    ({"target_modules": ["lm_head", "q_proj"]}, r"PEFT adapts 'lm_head' alone here; .*\(target_modules\)"),
    ({"target_modules": ["embed_tokens"]}, "PEFT adapts 'model.embed_tokens' alone"),
    ({"target_modules": ["embed_tokens", "lm_head"]}, "PEFT trains each of them apart"),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, r"'lm_head' alone here; .*\(modules_to_save\)"),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, "trains each of them apart"),
    ({"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1]}}, "'lm_head' alone here"),
])
def test_a_tied_weight_is_adapted_in_all_its_places(options, says):
    model = nets.decoder(tied=True)
    with pytest.warns(VeneerWarning, match=f"'model.embed_tokens' and 'lm_head' are one tied weight.*{says}"):
        found = translate(model, LoraConfig(**options))
    assert found.config.ensure_weight_tying
    assert "lm_head.weight" not in found.rules
    assert found.rules["model.embed_tokens.weight"] is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = translate(model, LoraConfig(ensure_weight_tying=True, **options))
    assert same.rules == found.rules
    veneer.attach(model, found.rules)
    model(**nets.inputs_for(model))


def test_what_was_trained_on_one_place_alone_is_not_laid_on_both():
    with pytest.raises(VeneerError, match=r"this adapter was trained on 'lm_head' alone.*Untie them first"):
        translate(nets.decoder(tied=True), q(modules_to_save=["lm_head"]), given=True)


def test_rows_of_a_tied_embedding_need_no_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = translate(nets.decoder(tied=True), q(trainable_token_indices=[1]))
    assert changed(found)["model.embed_tokens.weight"] == Rows([1])


def test_the_family_refuses_ties_and_nothing_is_tied():
    with pytest.raises(VeneerError, match="are one tied weight, and PEFT's LoHaConfig adapts each of its places apart"):
        translate(nets.decoder(tied=True), LoHaConfig(target_modules=["lm_head"]))
    with pytest.warns(UserWarning, match="ensure_weight_tying=True, and this model has no tied weights"):
        translate(nets.decoder(), q(ensure_weight_tying=True))
    with pytest.raises(VeneerError, match="named twice"):
        translate(nets.decoder(tied=True), q(ensure_weight_tying=True, trainable_token_indices={
            "embed_tokens": [1], "lm_head": [2]}))


# -- the family's options ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("config", "method"), [
    (LoHaConfig(r=3, alpha=6, rank_dropout=0.1, module_dropout=0.2),
     LoHa(rank=3, alpha=6, rank_dropout=0.1, module_dropout=0.2)),
    (LoHaConfig(use_effective_conv2d=True), LoHa(alpha=8, effective_conv=True)),
    (LoKrConfig(r=3, alpha=6, rank_dropout=0.1, module_dropout=0.2, rank_dropout_scale=True),
     LoKr(rank=3, alpha=6, rank_dropout=0.1, module_dropout=0.2)),
    (LoKrConfig(decompose_both=True, decompose_factor=4, use_effective_conv2d=True),
     LoKr(alpha=8, decompose_both=True, decompose_factor=4, effective_conv=True, rank_dropout_scale=False)),
    (LoKrConfig(init_weights="lycoris"), LoKr(alpha=8, init="lycoris", rank_dropout_scale=False)),
    (VeraConfig(r=5, projection_prng_key=3, vera_dropout=0.1, d_initial=0.2),
     VeRA(rank=5, seed=3, dropout=0.1, d_initial=0.2, save_bases=True)),
    (RandLoraConfig(r=5, projection_prng_key=3, randlora_dropout=0.1, randlora_alpha=10, sparse=True),
     RandLoRA(rank=5, seed=3, dropout=0.1, alpha=10, sparsity="sparse", save_bases=True)),
    (RandLoraConfig(very_sparse=True), RandLoRA(sparsity="very_sparse", save_bases=True)),
    (VBLoRAConfig(r=2, num_vectors=9, vector_length=4, topk=3, save_only_topk_weights=True, vblora_dropout=0.1,
                  init_vector_bank_bound=0.1, init_logits_std=0.2),
     VBLoRA(rank=2, num_vectors=9, vector_length=4, topk=3, save_only_topk_weights=True, dropout=0.1,
            init_vector_bank_bound=0.1, init_logits_std=0.2)),
    (AdaLoraConfig(target_r=3, init_r=5, tinit=2, tfinal=4, deltaT=3, beta1=0.7, beta2=0.8, orth_reg_weight=0.1,
                   total_step=20, lora_alpha=7, lora_dropout=0.1),
     AdaLoRA(target_r=3, init_r=5, tinit=2, tfinal=4, deltaT=3, beta1=0.7, beta2=0.8, orth_reg_weight=0.1,
             total_step=20, alpha=7, dropout=0.1)),
    (AdaLoraConfig(total_step=20, init_r=4), AdaLoRA(target_r=4, init_r=4, tinit=0, tfinal=0, total_step=20, alpha=8)),
    (AdaLoraConfig(total_step=20, lora_alpha=0), AdaLoRA(tinit=0, tfinal=0, total_step=20, alpha=12)),
], ids=lambda value: type(value).__name__)
def test_each_option_of_the_family(config, method):
    model = nets.decoder()
    found = translate(model, config)
    assert only(found) == method
    assert only(translate(model, config, given=True)) == method
    veneer.attach(model, found.rules)
    model(**nets.inputs_for(model))


@pytest.mark.parametrize(("config", "parts"), [
    (LoHaConfig(init_weights=False, r=2), {"hada_w1_a", "hada_w2_b"}),
    (LoKrConfig(init_weights=False, r=2), {"lokr_w1", "lokr_w2"}),
    (VeraConfig(init_weights=False, r=64), {"vera_lambda_b", "vera_lambda_d"}),
    (RandLoraConfig(init_weights=False, r=4), {"randlora_lambda", "randlora_gamma"}),
    (AdaLoraConfig(init_lora_weights=False, total_step=9, init_r=64), {"lora_A", "lora_E", "lora_B"}),
], ids=lambda value: type(value).__name__)
def test_without_zeros_the_family_begins_changed_as_in_peft(config, parts):
    model = nets.decoder()
    inputs = nets.inputs_for(model)
    base = model(**inputs).logits
    veneer.attach(model, translate(model, config).rules)
    assert not torch.equal(model(**inputs).logits, base)
    assert only(translate(nets.decoder(), config, given=True)).init != "random"
    options = {key: value for key, value in vars(config).items() if key not in ("peft_type", "peft_version")}
    torch.manual_seed(1)
    other = theirs(nets.decoder, type(config).__name__, options)
    from_file = file_type({"peft_type": config.peft_type.value}).parts
    for part, name in from_file.items():
        if name not in parts:
            continue
        mine = torch.cat([adapter.get_parameter(part).detach().flatten()
                          for _, adapter in attached(model, "default")])
        its = torch.cat([value.detach().flatten() for key, value in other.named_parameters()
                         if key.removesuffix(".weight").endswith(f".{name}.default")])
        assert len(mine) == len(its)
        assert 0.7 < (mine.abs().mean() / its.abs().mean()) < 1.4, name
        assert 0.6 < (mine.abs().max() / its.abs().max()) < 1.6, name


def test_a_start_that_adalora_does_not_have():
    with pytest.warns(VeneerWarning, match="init_lora_weights='olora' has no effect"):
        translate(nets.decoder(), AdaLoraConfig(total_step=9, init_lora_weights="olora"))


def test_bases_left_out_of_the_file():
    with pytest.warns(UserWarning, match="save_projection"):
        config = VeraConfig(save_projection=False)
    assert only(translate(nets.decoder(), config)) == VeRA(save_bases=False)


@pytest.mark.parametrize(("kind", "method"), [(LoHaConfig, LoHa), (LoKrConfig, LoKr)])
def test_ranks_of_the_family_by_pattern(kind, method):
    found = changed(translate(nets.decoder(), kind(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5})))
    assert {(name.split(".")[-2], m.rank, m.alpha) for name, m in found.items()} == {("q_proj", 2, 8), ("v_proj", 8, 5)}


# -- layers other than Linear --------------------------------------------------------------------------------
class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.attn = nn.MultiheadAttention(4, 2)
        self.free = nn.Parameter(torch.ones(3, 3))


def test_convolutions_and_attention():
    found = changed(translate(Odd(), LoraConfig(target_modules=["conv", "attn"], r=2, lora_dropout=0.5)))
    assert found == {"conv.weight": LoRA(rank=2, alpha=8, dropout=0.5), "attn.in_proj_weight": LoRA(rank=2, alpha=8),
                     "attn.out_proj.weight": LoRA(rank=2, alpha=8)}
    with pytest.raises(NotInVeneerError, match=r"'grouped', a convolution with groups=2"):
        translate(Odd(), LoraConfig(target_modules=["grouped"]))
    with pytest.raises(UnsupportedLayerError, match="reads its out_proj without calling it: target the attention"):
        translate(Odd(), LoraConfig(target_modules=["out_proj"]))
    with pytest.raises(ValueError, match="has neither DoRA nor lora_bias"):
        translate(Odd(), LoraConfig(target_modules=["attn"], use_dora=True))
    with pytest.raises(ValueError, match="'free' belongs to the model itself"):
        translate(Odd(), LoraConfig(target_modules=["conv"], target_parameters=["free"]))
    with pytest.raises(ValueError, match=r"'attn.in_proj_bias' has 1 dimensions"):
        translate(Odd(), LoraConfig(target_modules=["conv"], target_parameters=["in_proj_bias"]))
    assert translate(Odd(), LoHaConfig(target_modules=["grouped"])).modules == ("grouped",)


def test_all_linear_passes_by_what_attention_reads_itself():
    with pytest.raises(NoMatchingPeftModuleError, match="this Odd has no linear layer beside its output head"):
        translate(Odd(), LoraConfig(target_modules="all-linear"))


class Scaled(nn.Embedding):
    """An embedding with a forward of its own, as Gemma's."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 3


def test_an_embedding_with_a_forward_of_its_own():
    model = nn.Sequential(Scaled(5, 4), nn.Linear(4, 3))
    found = translate(model, LoraConfig(target_modules=["0"], r=2, lora_dropout=0.1))
    assert changed(found) == {"0.weight": LoRA(rank=2, alpha=8, init="torch.nn.init.normal_")}
    veneer.attach(model, found.rules)
    model(torch.tensor([1, 2]))


class Shared(nn.Module):
    """One module under two names, and one bias in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = nn.Linear(3, 3)
        self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)
        self.right.bias = self.left.bias


def test_a_module_goes_by_all_its_names():
    found = translate(Shared(), LoraConfig(target_modules=["left"], modules_to_save=["again"]))
    assert changed(found)["first.weight"] == Full()


def test_a_bias_of_two_layers_is_trained_for_both():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = translate(Shared(), LoraConfig(target_modules=["left"], bias="lora_only"))
    assert changed(found)["left.bias"] == Full()


def test_biases_inside_of_modules_trained_whole():
    found = translate(nets.encoder(), LoraConfig(bias="all", modules_to_save=["classifier"]))
    assert changed(found)["classifier.bias"] == Full()


def test_layers_that_kernels_read():
    model = nn.Module()
    model.config, model.out_proj = {"model_type": "mamba"}, nn.Linear(2, 2)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="'out_proj' is incompatible with model_type 'mamba'"):
        translate(model, LoraConfig(target_modules=["out_proj"]))
