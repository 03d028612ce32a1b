"""Whether an operator's reference can be traced for a call: it reads no values and makes no sizes of them."""

from __future__ import annotations

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..kernels.contract import Operator
from ..torch_private import FakeTensorMode, enable_python_dispatcher


def traces(node: Node, operator: Operator) -> str | None:
    """The validator of a lowering by reference: runs it on the call's fake tensors."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    values = [argument.meta["val"] for argument in node.all_input_nodes]
    mode = next((value.fake_mode for value in values if hasattr(value, "fake_mode")), None) or FakeTensorMode()
    try:
        with mode, enable_python_dispatcher(), torch.no_grad():
            made = operator.reference(*args, **kwargs)
    except Exception as error:  # what a reference raises on fake tensors is torch's to choose
        return f"its reference cannot be traced: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    expected = node.meta["val"]
    pairs = zip(made, expected, strict=False) if isinstance(expected, tuple | list) else [(made, expected)]
    for got, wanted in pairs:
        if got.dtype != wanted.dtype or got.dim() != wanted.dim():
            return f"its reference makes {got.dtype} of {got.dim()} dimensions, the operator {wanted.dtype}"
    return None
