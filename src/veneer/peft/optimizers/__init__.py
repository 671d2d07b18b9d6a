"""Optimizers for adapters under PEFT's names, over `veneer.optim`: LoRA+ and LoRA-FA."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from veneer.attached import adapter_names, attached
from veneer.method import VeneerWarning
from veneer.optim import EMBEDDING_RATE, lora_fa, lora_plus_groups
from veneer.peft.layers.lora import LoraLayer
from veneer.peft.saving import base_of
from veneer.wrappers import unwrap

__all__ = ["create_lorafa_optimizer", "create_loraplus_optimizer"]

_EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def create_loraplus_optimizer(model: nn.Module, optimizer_cls: Callable[..., Optimizer], *, lr: float,
                              loraplus_lr_ratio: float, **kwargs: Any) -> Optimizer:
    """An optimizer with LoRA+'s learning rates (Hayou et al. 2024, arXiv:2402.12354): `lr` for A, lr·loraplus_lr_ratio
    for B. See `veneer.optim.lora_plus_groups` for which parameter is in which group.

    kwargs: loraplus_weight_decay (0.0) of matrices, loraplus_lr_embedding (1e-6) of an embedding's adapter; the others
    go to `optimizer_cls`. Optimizers of bitsandbytes in 8 bit keep what belongs to embeddings in 32.
    """
    base = base_of(unwrap(model))
    groups = lora_plus_groups(base, lr, loraplus_lr_ratio, kwargs.pop("loraplus_weight_decay", 0.0),
                              kwargs.pop("loraplus_lr_embedding", EMBEDDING_RATE))
    optimizer = optimizer_cls(groups, lr=lr, **kwargs)
    if type(optimizer).__name__ in _EIGHT_BIT and "bitsandbytes" in sys.modules:
        manager = sys.modules["bitsandbytes"].optim.GlobalOptimManager.get_instance()
        manager.override_config(_of_embeddings(base), "optim_bits", 32)
    return optimizer


def _of_embeddings(base: nn.Module) -> list[nn.Parameter]:
    return [param for name in adapter_names(base) for weight, adapter in attached(base, name)
            if weight.layout.shape.lookup for param in adapter.parameters()]


def create_lorafa_optimizer(model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0,
                            use_rslora: bool | None = None) -> Optimizer:
    """Freeze A and return an AdamW whose gradients of B are projected (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303);
    see `veneer.optim.lora_fa`.

    Each layer's own scale counts. r, lora_alpha: those of the adapters; a warning where no layer has them.
    use_rslora: None, or what the adapters' configs say, else `ValueError`. Raises `VeneerError` for adapters that are
    no pair of factors (modules_to_save, say).
    """
    configs = dict(getattr(model, "peft_config", {}))
    active = [name for name in getattr(model, "active_adapters", []) if name in configs]
    wrong = [name for name in active if bool(getattr(configs[name], "use_rslora", False)) != use_rslora]
    if use_rslora is not None and wrong:
        raise ValueError(f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, and the config of the "
                         f"active adapter {', '.join(wrong)} has the opposite; set use_rslora in LoraConfig and leave "
                         "it out here")
    base = base_of(unwrap(model))
    layers = [module for module in base.modules() if isinstance(module, LoraLayer)]
    found = {(layer.r[name], layer.lora_alpha[name]) for layer in layers for name in layer.scaling}
    if found and (r, lora_alpha) not in found:
        pairs = ", ".join(f"r={rank}, lora_alpha={alpha}" for rank, alpha in sorted(found))
        warnings.warn(f"create_lorafa_optimizer: r={r}, lora_alpha={lora_alpha} are not those of the adapters, which "
                      f"have {pairs}; these count", VeneerWarning, stacklevel=2)
    return lora_fa(base, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.999), eps=1e-6)
