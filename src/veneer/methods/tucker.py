"""The effective decomposition of a convolution's kernel (FedPara, Hyeon-Woo et al. 2022, arXiv:2108.06098, prop. 3).

    V[o, c, k] = Σᵢⱼ t[i, j, k] · a[i, o] · b[j, c]

with a small core t that alone knows the kernel's positions: rank r costs r² · |kernel| + r · (out + channels)
numbers instead of r · (out + channels · |kernel|).
"""

from __future__ import annotations

import torch
from torch import Tensor


def columns(t: Tensor, b: Tensor) -> Tensor:
    """The part without `a`, as (r, channels · |kernel|): t (r, r, *kernel), b (r, channels)."""
    core = torch.einsum("ijk,jc->ick", t.flatten(2), b)
    return core.flatten(1)


def matrix(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """V flattened to (out, channels · |kernel|): a (r, out)."""
    return a.mT @ columns(t, b)
