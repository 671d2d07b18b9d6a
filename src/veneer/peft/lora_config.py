"""LoraConfig and the configs inside it, with the fields, order and defaults of Hugging Face PEFT 0.21
(peft/tuners/lora/config.py)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from veneer.io.dialects.hf_lora import REFUSED
from veneer.method import VeneerError, nearest
from veneer.notices import say
from veneer.peft.config import PeftConfig, register_config
from veneer.peft.errors import NotInVeneerError
from veneer.peft.types import PeftType

#: values of init_lora_weights beside True, False, None and pissa_niter_N
STARTS = ("gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "corda", "lora_ga")
#: those which, in PEFT, leave less of the base weights
_REWRITING = ("pissa", "olora", "corda", "lora_ga")
_NITER = re.compile(r"pissa_niter_\d+")
_LAYERS = "layers_to_transform"


# -- what stands in a LoraConfig ----------------------------------------------------------------------------
@dataclass
class LoraRuntimeConfig:
    """Not saved. ephemeral_gpu_offload: without effect here, no start needs it."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoftQConfig:
    """loftq_bits: 2, 4 or 8; loftq_iter: steps of the alternation."""

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class EvaConfig:
    """rho: no weight gets more than rho times the rank. tau: cosine at which a component counts as found.
    use_label_mask, label_mask_value: leave out positions with this label. whiten: unit covariance of A x.
    adjust_scaling_factors: weights of another rank keep their scale. Raises `ValueError` for rho below 1 or tau outside
    0 to 1."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1.0:
            raise ValueError(f"EvaConfig: `rho` must be >= 1.0, got {self.rho}")
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"EvaConfig: `tau` must be between 0.0 and 1.0, got {self.tau}")


@dataclass
class CordaConfig:
    """cache_file, covariance_file: where `preprocess_corda` keeps what it found. corda_method: "ipm" learns what such
    inputs call for, "kpm" leaves it alone. The other fields say how `preprocess_corda` works."""

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@dataclass
class LoraGAConfig:
    """direction, scale: Veneer has "ArB2r" and "stable", those of the paper. stable_gamma: the paper's γ."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16


# -- the config ---------------------------------------------------------------------------------------------
@register_config(PeftType.LORA)
@dataclass
class LoraConfig(PeftConfig):
    """LoRA and what is said in its terms: DoRA, rsLoRA, and its starts.

    r, lora_alpha, lora_dropout: rank, α of the scale α/r, dropout on the adapter's input. use_rslora: scale α/√r.
    use_dora: train lengths too. lora_bias: train an addition to the layer's bias.
    target_modules: list of ends of names, a regex for whole names, "all-linear", or None for the architecture's usual
    ones. exclude_modules: the same way, wins. layers_to_transform, layers_pattern: layers to adapt, by number, and what
    their list is called. target_parameters: ends of names of parameters.
    rank_pattern, alpha_pattern: other values by regex for the end of a name.
    modules_to_save: ends of names of modules that are trained whole. trainable_token_indices: token ids whose rows are
    trained, of the input embedding or by module. ensure_weight_tying: what is tied stays so. bias: which of the base's
    biases are trained, "none", "all", "lora_only".
    init_lora_weights: True, False (neither A nor B zero), "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora",
    "loftq", "eva", "corda", "lora_ga"; loftq_config, eva_config, corda_config, lora_ga_config: their settings.
    layer_replication: ranges of layers to build the model anew from. fan_in_fan_out: found by Veneer itself.

    Fields that say something of which Veneer has nothing raise `NotInVeneerError` when set. Raises `ValueError` or
    `TypeError` for values that cannot be, as PEFT does.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str | None = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict | None = field(default_factory=dict)
    alpha_pattern: dict | None = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()
        found.pop("runtime_config")
        return found

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        self._refuse_what_is_missing()
        as_sets(self)
        self.eva_config = _inner(self.eva_config, EvaConfig)
        self.corda_config = _inner(self.corda_config, CordaConfig)
        self.lora_ga_config = _inner(self.lora_ga_config, LoraGAConfig)
        if isinstance(self.target_parameters, str):
            raise TypeError(f"`target_parameters` must be a list of strings or None, got {self.target_parameters!r}")
        check_layers(self, pattern_alone=True)
        self._check_start()
        if self.lora_bias and self.init_lora_weights not in (True, False):
            raise ValueError(f"lora_bias=True goes with init_lora_weights=True or False only, and it is "
                             f"{self.init_lora_weights!r}")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias=True is not supported for DoRA; set use_dora=False or lora_bias=False")
        self._warn_of_scales()

    @property
    def start(self) -> str:
        """`init_lora_weights` in one spelling: "True", "False" or a name in lower case."""
        return str(self.init_lora_weights or False).lower() if isinstance(self.init_lora_weights, str) else \
            str(bool(self.init_lora_weights))

    def _refuse_what_is_missing(self) -> None:
        for name, what in REFUSED.items():
            if name != "layer_replication" and getattr(self, name):
                raise NotInVeneerError(f"{type(self).__name__}: {name}={getattr(self, name)!r}: {what}, which Veneer "
                                       "does not have; leave it at its default, or use the original peft")
        if self.start == "mica":
            raise NotInVeneerError("LoraConfig: init_lora_weights='mica' trains A alone, which Veneer does not have; "
                                   f"use one of True, False, {', '.join(STARTS)}, or the original peft")

    def _check_start(self) -> None:
        name = self.start
        if name not in ("True", "False", *STARTS) and not _NITER.fullmatch(name):
            raise VeneerError(f"Unknown initialization init_lora_weights={self.init_lora_weights!r}"
                              f"{nearest(name, [*STARTS, 'pissa_niter_4']) or '.'} Possible: True, False, "
                              f"{', '.join(STARTS)}, pissa_niter_N")
        if name == "loftq":
            if not self.loftq_config:
                raise ValueError("init_lora_weights='loftq' needs `loftq_config`; give LoftQConfig(loftq_bits=4)")
            if not isinstance(self.loftq_config, dict):
                self.loftq_config = dict(vars(self.loftq_config))
        elif self.loftq_config:
            self.loftq_config = {}
            _ignored("loftq_config", "loftq")
        elif name == "eva" and self.eva_config is None:
            _default("eva", "EvaConfig")
            self.eva_config = EvaConfig()
        elif name != "eva" and self.eva_config is not None:
            _ignored("eva_config", "eva")
        elif name == "corda" and self.corda_config is None:
            _default("corda", "CordaConfig")
            self.corda_config = CordaConfig()
        elif name != "corda" and self.corda_config is not None:
            _ignored("corda_config", "corda")

    def _warn_of_scales(self) -> None:
        """Where PEFT cannot turn what was trained back into plain LoRA, files of it are of no use to others."""
        rewriting = self.start in _REWRITING or self.start.startswith("pissa")
        if self.use_rslora and (self.rank_pattern or self.alpha_pattern) and rewriting:
            say("use_rslora with rank_pattern or alpha_pattern and a start from the base weights "
                f"({self.init_lora_weights}): in PEFT `path_initial_model_for_weight_conversion` cannot be "
                "used then. Veneer saves plain LoRA in any case", UserWarning)


# -- checks that other configs share ------------------------------------------------------------------------
T = TypeVar("T")


def as_sets(config: Any) -> None:
    """target_modules and exclude_modules as sets where they are lists."""
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name, None)
        if isinstance(value, list):
            setattr(config, name, set(value))


def check_layers(config: Any, *, by_regex: bool = True, pattern_alone: bool = False) -> None:
    """Raise `ValueError` for layers_to_transform and layers_pattern that contradict target_modules or each other.

    by_regex: a regex and layers_to_transform exclude each other. pattern_alone: a regex and layers_pattern do too.
    """
    regex, owner = isinstance(config.target_modules, str), type(config).__name__
    if regex and by_regex and config.layers_to_transform is not None:
        raise ValueError(f"{owner}: `{_LAYERS}` cannot be used when `target_modules` is a str "
                         f"({config.target_modules!r}); name the layers in it, or give a list of names")
    if regex and pattern_alone and config.layers_pattern is not None:
        raise ValueError(f"{owner}: `layers_pattern` cannot be used when `target_modules` is a str "
                         f"({config.target_modules!r})")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError(f"{owner}: `layers_pattern` is given, so `{_LAYERS}` must be too: it says which layers of "
                         f"{config.layers_pattern!r}")


def _inner(value: Any, kind: type[T]) -> T | None:
    """A config inside a config, which a file holds as a dict."""
    if value is None or isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
        for key in value:
            if key not in known:
                raise VeneerError(f"{kind.__name__} has no setting {key!r}{nearest(str(key), known) or '.'} It has "
                                  f"{', '.join(known)}")
        return kind(**value)
    raise TypeError(f"a {kind.__name__}, a dict or None is expected, got {value!r}")


def _ignored(name: str, start: str) -> None:
    say(f"`{name}` specified but will be ignored when `init_lora_weights` is not {start!r}", UserWarning)


def _default(start: str, kind: str) -> None:
    say(f"`init_lora_weights` is {start!r} and its config is not given: taking {kind}()", UserWarning)
