"""Hadamard rotations as products: one small matrix product for each factor, with the factors as stored tensors.

    x [..., n]  ->  [..., blocks, m1, m2, ...]  ->  times each factor [m, m] along its axis  ->  [..., n]

The operator makes its matrices when it runs; a graph has to hold them. Factors are at most 512 wide, so they take
little where the whole matrix of 1536 channels would take 9 MB.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ...kernels import int4_linear as _int4_linear  # noqa: F401 (registers the operator)
from ...kernels.contract import Operator
from ...kernels.hadamard import orders, signs
from ...passes.edit import Edit
from ...patterns.nodes import arguments


@torch.library.custom_op("graphwright_body::rotate", mutates_args=())
def _rotate(x: Tensor, factors: list[Tensor], blocks: int) -> Tensor:
    """Stands for `rotate_body` until that is traced."""
    return rotate_body(x, factors, blocks).clone()


@_rotate.register_fake
def _(x: Tensor, factors: list[Tensor], blocks: int) -> Tensor:
    return x.new_empty(x.shape)


def rotate_body(x: Tensor, factors: list[Tensor], blocks: int) -> Tensor:
    """x [..., n] times the Kronecker product of float32 factors, in equal blocks; float32 inside."""
    y = x.float().unflatten(-1, (blocks, *(len(factor) for factor in factors)))
    for place, factor in enumerate(factors):
        axis = place - len(factors)
        y = (y.transpose(axis, -1) @ factor).transpose(axis, -1)
    return y.flatten(-1 - len(factors)).to(x.dtype)


def rotate(edit: Edit, x: Node, like: Node) -> Node:
    """Insert the rotation of a value's last dimension before `like`."""
    blocks, factors = orders(int(x.meta["val"].shape[-1]))
    stored = [edit.buffer(f"hadamard.{order}", lambda m=order: signs(m).float() / m**0.5) for order in factors]
    return edit.call(torch.ops.graphwright_body.rotate.default, x, stored, blocks, like=like)


def rotate_call(edit: Edit, node: Node) -> Node:
    """`hadamard`, as `Rewrite` wants it."""
    return rotate(edit, arguments(node)["x"], node)


def rotate_first(edit: Edit, node: Node) -> Node:
    """`int4_linear` whose rotation is an operation of its own."""
    a = arguments(node)
    if a["hadamard"]:
        a |= {"x": rotate(edit, a["x"], node), "hadamard": False}
    return edit.call(torch.ops.graphwright.int4_linear.default, *a.values(), like=node)


def known_width(node: Node, operator: Operator) -> str | None:
    """The validator: the factors are chosen by the size."""
    width = arguments(node)["x"].meta["val"].shape[-1]
    return None if isinstance(width, int) else f"the rotated size {width} is not known before it runs"


ROTATE = {torch.ops.graphwright_body.rotate.default: rotate_body}
"""The body of what `rotate` inserts."""
