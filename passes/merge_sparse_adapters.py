"""Give a linear its pruned weight, adapters merged in.

    x ── linear(W, b) ── y      becomes      x ── linear(W', b) ── y                                    form = "dense"
                                becomes      x ── graphwright.bitmask_linear(W' compressed, b) ── y     "compressed"

W' comes from the profile, compressed (`kernels/bitmask_weights.py`). All phases get it or none: they are one model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..kernels import bitmask_linear
from ..kernels.bitmask_weights import Bitmask, bitmask_reason, decompress
from ..patterns.flow import LINEAR
from ..patterns.linear import LinearSite
from .base import SitePass
from .edit import Edit

FORMS = ("compressed", "dense")


@dataclass(frozen=True)
class MergeSparseAdapters(SitePass[LinearSite]):
    """A sparse weight in the place of a dense one.

    Attributes:
        weight: Prefix of the profile's tensors `.bits`, `.values` and `.starts`.
        form: How it is stored in the program.
    """

    name: ClassVar[str] = "merge_sparse_adapters"
    changes_state: ClassVar[bool] = True

    weight: str = ""
    form: str = "compressed"

    def guard(self, site: LinearSite, edit: Edit) -> str | None:
        """A float weight, and tensors of the profile that are a weight of its size."""
        if self.form not in FORMS:
            return f"got form {self.form!r}, expected {' or '.join(FORMS)}"
        stored = edit.constant(site.weight)
        if not stored.is_floating_point():
            return f"adapters are merged before weights are quantized, got a weight of {stored.dtype}"
        parts = [edit.shared.get(f"{self.weight}.{part}") for part in Bitmask._fields]
        if any(part is None for part in parts):
            return f"the profile has no weight {self.weight!r}"
        bits, values, starts = (part for part in parts if part is not None)
        if values.dtype != stored.dtype:
            return f"{self.weight} is of {values.dtype}, the program's weight of {stored.dtype}"
        reason = bitmask_reason(bits, values, starts, site.out_features, site.in_features)
        if reason is not None or self.form == "dense":
            return reason
        bias = None if site.bias is None else site.bias.meta["val"]
        x = site.input.meta["val"]
        return bitmask_linear.CONTRACT.check(x=x, bits=bits, values=values, starts=starts, bias=bias)

    def rewrite(self, site: LinearSite, edit: Edit) -> None:
        """Read the new weight instead of the old one."""
        bias = [] if site.bias is None else [site.bias]
        if self.form == "dense":
            bits, values = (edit.shared[f"{self.weight}.{part}"] for part in ("bits", "values"))
            weight = edit.buffer(f"{self.weight}.dense", lambda: decompress(bits, values, site.in_features))
            edit.replace(site.node, edit.call(LINEAR, site.input, weight, *bias, like=site.node))
            return
        stored = [
            edit.buffer(f"{self.weight}.{part}", lambda part=part: edit.shared[f"{self.weight}.{part}"])
            for part in Bitmask._fields
        ]
        operator = torch.ops.graphwright.bitmask_linear.default
        edit.replace(site.node, edit.call(operator, site.input, *stored, site.bias, like=site.node))
