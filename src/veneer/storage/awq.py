"""AWQ layers of autoawq and gptqmodel in the GEMM layout, read only (Lin et al. 2023, arXiv:2306.00978).

W[j, i] = scales[g, j] · (q[i, j] − zeros[g, j]), g = i // group; q and zeros packed along the outputs, 8 to an int32,
in the order 0 2 4 6 1 3 5 7 from its lowest bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.storage.base import Storage, class_names, make_plain, own_class
from veneer.storage.packed_integers import dense, refuse_adapter, unpack

_AS_SAVED = (("awq", "WQLinear_GEMM"), ("gptqmodel", "AwqTorchQuantLinear"), ("gptqmodel", "AwqTorchLinear"),
             ("gptqmodel", "AwqGEMMQuantLinear"), ("gptqmodel", "AwqGEMMLinear"))
#: where each of eight outputs lies in a word, by its place from the lowest bits
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_TENSORS = ("qweight", "qzeros", "scales")
_SETTINGS = ("w_bit", "bits", "group_size", "maxq", "sym", "desc_act", "pack_dtype")


class AWQ(Storage):
    """qweight int32 (in, out/8), qzeros int32 (groups, out/8), scales (groups, out); 4 bits."""

    name = "awq"
    own_gradient = False  # autoawq's forward runs under no_grad

    def claims(self, module: nn.Module) -> bool:
        names = class_names(module)
        known = any((package == "awq" and "WQLinear" in name) or (package == "gptqmodel" and "Awq" in name)
                    for package, name in names)
        return known and "qweight" in module._buffers

    def refusal(self, module: nn.Module) -> str | None:
        kind = own_class(module)
        if (kind.__module__.partition(".")[0], kind.__name__) in _AS_SAVED:
            return refuse_adapter(module)
        return (f"{kind.__name__} ({kind.__module__}) has another layout than AWQ's GEMM checkpoints, which cannot be "
                f"read; load the model with one of {', '.join(name for _, name in _AS_SAVED)} (version \"gemm\")")

    def size(self, module: Any) -> tuple[int, int]:
        return module.scales.shape[1], module.qweight.shape[0]

    def carrier(self, module: Any) -> Tensor:
        return module.qweight

    def dtype(self, module: Any) -> torch.dtype:
        return module.scales.dtype

    def read(self, module: Any, dtype: torch.dtype | None = None) -> Tensor:
        codes, zeros = _in_order(module.qweight), _in_order(module.qzeros)
        return dense(codes, zeros, module.scales, None, dtype or self.dtype(module))

    def unpack(self, module: Any, weight: Tensor) -> type[nn.Module]:
        return make_plain(module, weight, self.size(module), (*_TENSORS, *_SETTINGS))


def _in_order(words: Tensor) -> Tensor:
    """int32 (n, out/8) → uint8 (n, out)."""
    codes = unpack(words, 4).unflatten(-1, (-1, 8))
    return codes[..., torch.tensor(_ORDER, device=words.device)].flatten(-2)
