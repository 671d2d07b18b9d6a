"""The configs of LoRA's family, with the fields, order and defaults of Hugging Face PEFT 0.21 (the config modules in
peft/tuners/{adalora,loha,lokr,vblora,randlora,vera} and peft/tuners/lycoris_utils.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from veneer.notices import say
from veneer.peft.config import PeftConfig, register_config
from veneer.peft.lora_config import LoraConfig, as_sets, check_layers
from veneer.peft.types import PeftType


@register_config(PeftType.ADALORA)
@dataclass
class AdaLoraConfig(LoraConfig):
    """AdaLoRA: ranks are cut while training, until `target_r` are left on average.

    init_r, target_r: ranks at the start, and on average in the end (`r` is not used). total_step: optimizer steps of
    the whole run. tinit, tfinal: steps without cuts at the beginning and the end. deltaT: steps between cuts. beta1,
    beta2: of the averages that triplets are judged by. orth_reg_weight: of the orthogonality term. rank_pattern: which
    triplets are left, written by training. The others as for `LoraConfig`.

    Raises `ValueError` without total_step, for a schedule without cuts, and with DoRA or LoftQ.
    """

    rank_pattern: dict | None = None
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADALORA
        if self.use_dora:
            raise ValueError("AdaLoraConfig: AdaLoRA does not support DoRA; set use_dora=False")
        if self.loftq_config:
            raise ValueError("AdaLoraConfig: AdaLoRA does not support LoftQ; leave out loftq_config")
        if self.r != 8:
            say(f"AdaLoraConfig: `r` (= {self.r}) is not used by AdaLoRA and will be ignored; the rank at "
                "the start is `init_r`", UserWarning)
        if self.total_step is None or self.total_step <= 0:
            raise ValueError("AdaLoraConfig: AdaLoRA needs `total_step`, the number of optimizer steps of the whole "
                             f"run, and it is {self.total_step}")
        if self.orth_reg_weight < 0:
            raise ValueError(f"AdaLoraConfig: `orth_reg_weight` must be at least 0, got {self.orth_reg_weight}")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(f"AdaLoraConfig: no steps are left to cut ranks in: of total_step={self.total_step} the "
                             f"first tinit={self.tinit} and the last tfinal={self.tfinal} are without cuts")


@dataclass
class LycorisConfig(PeftConfig):
    """What LoHa and LoKr share: other ranks and alphas by regex for the end of a name."""

    rank_pattern: dict | None = field(default_factory=dict)
    alpha_pattern: dict | None = field(default_factory=dict)


@register_config(PeftType.LOHA)
@dataclass
class LoHaConfig(LycorisConfig):
    """LoHa. r, alpha: rank of each of the two products, α of the scale α/r. rank_dropout, module_dropout: in training,
    leave out single outputs of the change, or all of it. use_effective_conv2d: decompose a convolution's kernel too.
    init_weights=False: nothing starts at zero. The others as for `LoraConfig`."""

    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOHA
        as_sets(self)
        check_layers(self, by_regex=False)


@register_config(PeftType.LOKR)
@dataclass
class LoKrConfig(LycorisConfig):
    """LoKr. decompose_both: both factors may be of low rank. decompose_factor: how sizes are split in two.
    rank_dropout_scale: rescale what rank_dropout leaves. init_weights: True, "lycoris", or False. The others as for
    `LoHaConfig`."""

    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool | Literal["lycoris"] = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOKR
        as_sets(self)
        check_layers(self, by_regex=False)


@register_config(PeftType.VBLORA)
@dataclass
class VBLoRAConfig(PeftConfig):
    """VB-LoRA. num_vectors, vector_length: of the bank that all share. topk: vectors mixed for a sub-vector.
    save_only_topk_weights: a small file that cannot be trained on. init_vector_bank_bound, init_logits_std: of the
    start. The others as for `LoraConfig`; bias may be "vblora_only"."""

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.VBLORA
        as_sets(self)
        check_layers(self, by_regex=False)


@register_config(PeftType.RANDLORA)
@dataclass
class RandLoraConfig(PeftConfig):
    """RandLoRA. r: rank of each base, a smaller one trains more. projection_prng_key: seed of the bases.
    save_projection: write them into the file. sparse, very_sparse: bases with many zeros. The others as for
    `LoraConfig`; bias may be "randlora_only"."""

    r: int = 32
    target_modules: list[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: int = 640
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.RANDLORA
        as_sets(self)
        _warn_of_bases(self)


@register_config(PeftType.VERA)
@dataclass
class VeraConfig(PeftConfig):
    """VeRA. r: rank of the shared bases. projection_prng_key: their seed; save_projection: write them into the file.
    d_initial: what d starts at. The others as for `LoraConfig`; bias may be "vera_only"."""

    r: int = 256
    target_modules: list[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.VERA
        as_sets(self)
        check_layers(self, by_regex=False)
        _warn_of_bases(self)


def _warn_of_bases(config: Any) -> None:
    if not config.save_projection:
        say(f"{type(config).__name__}: save_projection=False leaves the random bases out of the file; they "
            "are drawn again from projection_prng_key, by PEFT not with the same numbers on every machine", UserWarning)
