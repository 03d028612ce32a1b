"""Linear CKA of layer inputs: how alike two layers' representations of the same texts are, from 0 to 1.

    F_l: a layer's input, one row a text [n, tokens * channels];   G_l = J F_l F_l^T J,   J = I - 1/n
    CKA_ij = <G_i, G_j> / (||G_i|| ||G_j||)

Only the Gram matrices [n, n] are kept, so layers can be looked at one after the other as a program runs.

Source: Kornblith et al. 2019, arXiv:1905.00414 (linear kernel, biased estimate); LoSA (Huang et al. 2025,
arXiv:2502.14816) takes it for the mutual information of layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InvalidArgument


def gram(rows: Sequence[Tensor]) -> Tensor:
    """The centred Gram matrix, float64 [n, n], of n texts' activations, each of equally many values.

    Raises:
        InvalidArgument: Texts differ in length, or an activation holds NaN or infinity.
    """
    if len({row.numel() for row in rows}) != 1:
        raise InvalidArgument("similarity of layers needs texts of one length")
    flat = torch.stack([row.detach().float().flatten() for row in rows])
    result = (flat @ flat.t()).double()
    if not result.isfinite().all():
        raise InvalidArgument("a layer's input holds NaN or infinity; check the calibration")
    return result - result.mean(0, keepdim=True) - result.mean(1, keepdim=True) + result.mean()


def cka(grams: Sequence[Tensor]) -> Tensor:
    """The matrix of similarities [L, L] of centred Gram matrices; a layer that tells no text apart is like none."""
    flat = torch.stack([matrix.flatten() for matrix in grams])
    lengths = flat.norm(dim=1, keepdim=True)
    flat = torch.where(lengths > 0, flat / lengths.clamp_min(1e-300), 0.0)
    return flat @ flat.t()


def redundancy(similarity: Tensor) -> Tensor:
    """How alike each layer is to all others together, a share of the total, [L]."""
    others = similarity.sum(1) - similarity.diagonal()
    return others / others.sum().clamp_min(1e-300)
