"""The leading singular directions of a matrix, by the eigenvectors of its smaller Gram matrix in fp64.

For the short and wide matrices here this takes a fraction of an SVD's time, and fp64 leaves what squaring costs far
below the rounding of the fp32 numbers that come in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.low_rank import spectrum_of, widened

#: directions weaker than this, relative to the strongest, are rounding
NOISE = 1e-6
#: above so many rows and columns a Gram matrix's eigenvectors take longer than a randomised SVD
_GRAM_UP_TO = 2048


def wide(tensor: Tensor) -> Tensor:
    """In fp64, on a device that has it."""
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def leading_directions(matrix: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Singular values (k,), descending, and orthonormal right singular vectors (k, columns) of a matrix in fp64.

    k is `most`, or less where the matrix has a smaller rank. Signs are such that each vector's largest entry is
    positive.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix.mT @ matrix if tall else matrix @ matrix.mT)
    values = squares.flip(0)[:most].clamp_min(0).sqrt()
    values = values[values > NOISE * values[:1]] if len(values) else values
    chosen = vectors.flip(1)[:, : len(values)]
    right = chosen.mT if tall else (chosen / values).mT @ matrix
    return values, signed(orthonormal(right))


def triplets(matrix: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets U (rows, k), singular values (k,), Vᵀ (k, columns), in fp64; k as above."""
    if min(matrix.shape) > _GRAM_UP_TO:
        spectrum = spectrum_of(widened(matrix), most)
        values = spectrum.values[:most]
        count = int((values > NOISE * values[0]).sum())
        left, right = spectrum.vectors(count)
        return left, values[:count], right
    matrix = wide(matrix)
    values, right = leading_directions(matrix, most)
    return orthonormal((matrix @ right.mT / values).mT).mT, values, right


def orthonormal(rows: Tensor) -> Tensor:
    """Nearly orthonormal rows made so, the first ones changing least."""
    # Dividing by small singular values leaves weak directions with a trace of the strong ones.
    columns, triangle = torch.linalg.qr(rows.mT)
    return (columns * triangle.diagonal().sign()).mT


def signed(rows: Tensor) -> Tensor:
    """Every row with its largest entry positive, so that a direction has one name."""
    if not len(rows):
        return rows
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * largest.sign()
