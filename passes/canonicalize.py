"""The way from an exported graph to the canonical dialect: plain ATen to plain ATen, exact.

Whatever form a model was written in, later stages meet one form of each thing: one linear, one rms_norm, one SDPA with
grouped heads and the mask that was proved. A canonical program runs, saves and exports with no graphwright installed.
"""

from __future__ import annotations

from torch import Tensor
from torch.export import ExportedProgram

from .base import Pass
from .dialects import verify
from .drop_noops import DropNoops
from .manager import OnPass, PassManager, PassRecord
from .merge_duplicates import MergeDuplicates
from .prove_masks import ProveMasks
from .raise_attention import RaiseAttention
from .raise_linear import RaiseLinear
from .raise_rms_norm import RaiseRmsNorm

CANONICALIZERS: tuple[Pass, ...] = (
    DropNoops(),
    RaiseLinear(),
    RaiseRmsNorm(),
    RaiseAttention(),
    ProveMasks(),
    MergeDuplicates(),
)


def canonicalize(
    exported: ExportedProgram,
    phase: str = "main",
    shared: dict[str, Tensor] | None = None,
    on_pass: OnPass | None = None,
) -> list[PassRecord]:
    """Bring a functional program into the canonical dialect, in place.

    Args:
        exported: What `run_decompositions({})` gave.
        phase: Its name, for the records.
        shared: Tensors that several phases share.
        on_pass: Called after each pass.

    Returns:
        One record a pass.

    Raises:
        VerificationError: A pass broke an invariant, or something is left that the canonical dialect does not hold.
    """
    records = PassManager(CANONICALIZERS, on_pass=on_pass).run(exported, phase, shared)
    verify(exported, "canonical", "canonicalize")
    return records
