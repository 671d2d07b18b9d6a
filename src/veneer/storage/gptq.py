"""GPTQ layers of gptqmodel and auto-gptq, read only (Frantar et al. 2022, arXiv:2210.17323).

W[j, i] = scales[g, j] · (q[i, j] − zeros[g, j]) with g = g_idx[i]; q packed along the inputs, zeros along the outputs.
Checkpoints in the first format hold zero − 1, in as many bits, so that 0 is held as the largest code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.storage.base import Storage, class_names, make_plain
from veneer.storage.packed_integers import dense, refuse_adapter, unpack

_PACKAGES = ("gptqmodel", "auto_gptq")
#: layers that keep the checkpoint's layout. What derives from them may not: other kernels lay the codes out anew.
_AS_SAVED = ("TorchQuantLinear", "TorchLinear", "TritonV2QuantLinear", "TritonV2Linear")
#: auto-gptq calls every layer QuantLinear; these of its modules keep the layout
_MODULES = ("qlinear_cuda", "qlinear_cuda_old", "qlinear_triton", "qlinear_tritonv2")
_TENSORS = ("qweight", "qzeros", "scales", "g_idx")


class GPTQ(Storage):
    """qweight int32 (in·bits/32, out), qzeros int32 (groups, out·bits/32), scales (groups, out), g_idx (in,)."""

    name = "gptq"

    def claims(self, module: nn.Module) -> bool:
        kind = _kind(module)
        return kind is not None and "Awq" not in kind.__name__ and "qweight" in module._buffers

    def refusal(self, module: nn.Module) -> str | None:
        kind = _kind(module)
        assert kind is not None
        if kind.__name__ in _AS_SAVED or kind.__module__.rpartition(".")[2] in _MODULES:
            return refuse_adapter(module)
        return (f"{kind.__name__} ({kind.__module__}) lays its weight out for its own kernel, which cannot be read; "
                f"load the model with the backend \"torch\" (read are {', '.join(_AS_SAVED)})")

    def size(self, module: Any) -> tuple[int, int]:
        qweight = module.qweight
        return qweight.shape[1], qweight.shape[0] * qweight.element_size() * 8 // module.bits

    def carrier(self, module: Any) -> Tensor:
        return module.qweight

    def dtype(self, module: Any) -> torch.dtype:
        return module.scales.dtype

    def read(self, module: Any, dtype: torch.dtype | None = None) -> Tensor:
        bits = module.bits
        zeros = unpack(module.qzeros, bits)
        if module.__dict__.get("_qzeros_format", 1) == 1:
            zeros = (zeros + 1) & (2**bits - 1)
        codes = unpack(module.qweight.T, bits).T
        return dense(codes, zeros[:, :codes.shape[1]], module.scales, module.g_idx, dtype or self.dtype(module))

    def unpack(self, module: Any, weight: Tensor) -> type[nn.Module]:
        return make_plain(module, weight, self.size(module), (*_TENSORS, *_SETTINGS))


_SETTINGS = ("bits", "group_size", "maxq", "sym", "desc_act", "infeatures", "outfeatures", "_qzeros_format",
             "pack_dtype", "wf", "wf_unsqueeze_zero", "wf_unsqueeze_neg_one", "dequantize_weight")


def _kind(module: nn.Module) -> type | None:
    """The library's class of this layer, nearest first."""
    for (package, name), kind in zip(class_names(module), type(module).__mro__, strict=True):
        if package in _PACKAGES and not name.startswith("Adapted"):
            return kind
    return None
