"""Whether an operator's reference can be traced for a call: it reads no values and makes no sizes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..kernels.contract import Operator
from ..torch_private import FakeTensorMode, TorchDispatchMode, enable_python_dispatcher


class _Writes(TorchDispatchMode):
    """Refuses operators that write."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise NotImplementedError(f"it writes in place ({func})")
        return func(*args, **(kwargs or {}))


def traces(node: Node, operator: Operator) -> str | None:
    """The validator of a lowering by reference: runs it on the call's fake tensors."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    values = [argument.meta["val"] for argument in node.all_input_nodes]
    mode = next((value.fake_mode for value in values if hasattr(value, "fake_mode")), None) or FakeTensorMode()
    try:
        with mode, _Writes(), enable_python_dispatcher(), torch.no_grad():
            made = operator.reference(*args, **kwargs)
    except Exception as error:  # what a reference raises on fake tensors is torch's to choose
        return f"its reference cannot be traced: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    expected = node.meta["val"]
    pairs: Any = zip(made, expected, strict=False) if isinstance(expected, tuple | list) else [(made, expected)]
    for got, wanted in pairs:
        if got.dtype != wanted.dtype or got.dim() != wanted.dim():
            return f"its reference makes {got.dtype} of {got.dim()} dimensions, the operator {wanted.dtype}"
    return None
