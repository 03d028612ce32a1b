"""What sparse attentions of a program keep, head by head: density, recall, and which row of the lists a head took.

Recall is the share of a query's attention mass that the kept keys have, averaged over the queries of a head: with the
log-sum-exp of the sparse and of the dense scores it is exp(sparse - dense), so no attention map is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..kernels.block_lists import density
from ..passes.dialects import graph_arguments

_OPERATOR = "graphwright.block_sparse_attention.default"


def attention_figures(exported: ExportedProgram, flat: list[Any]) -> dict[str, dict[str, list[Any]]]:
    """Run a rewritten program once and measure its sparse attentions.

    Args:
        exported: The program of a phase, rewritten.
        flat: Its inputs.

    Returns:
        Site id -> `density` and `recall` by head, means over the batch, and `row` by head of the first in the batch
        where heads choose among rows. Empty where there is no sparse attention.
    """
    if not any(str(node.target) == _OPERATOR for node in exported.graph.nodes):
        return {}
    runner = _FigureRunner(exported)
    with torch.no_grad():
        runner.run(*graph_arguments(exported, flat), enable_io_processing=False)
    return runner.found


class _FigureRunner(torch.fx.Interpreter):
    def __init__(self, exported: ExportedProgram) -> None:
        super().__init__(exported.graph_module)
        self.found: dict[str, dict[str, list[Any]]] = {}

    def run_node(self, n: Node) -> Any:
        site = n.meta.get("graphwright", {}).get("site")
        if str(n.target) == _OPERATOR and site is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self.found[site] = _figures(*args, **kwargs)
        return super().run_node(n)


def _figures(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    blocks: Tensor,
    pattern: Tensor | None = None,
    order: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    key_blocks: int,
    block_size: int,
    scale: float | None = None,
) -> dict[str, list[Any]]:
    with_lse = torch.ops.graphwright.block_sparse_attention_lse
    sparse = with_lse(
        query, key, value, counts, blocks, pattern, order, key_bias,
        key_blocks=key_blocks, block_size=block_size, scale=scale,
    )[1]  # fmt: skip
    none = counts.new_zeros((1, 0)), blocks.new_zeros((1, 0, 1))  # every query is beyond the lists: all rows are dense
    dense = with_lse(query, key, value, *none, None, None, key_bias, key_blocks=0, block_size=block_size, scale=scale)[
        1
    ]
    batch, heads, tokens = sparse.shape
    if pattern is not None:
        rows = pattern.expand(batch, heads)
    elif len(counts) == 1:
        rows = torch.zeros(batch, heads, dtype=torch.int64)
    else:
        rows = torch.arange(batch * heads).view(batch, heads) % len(counts)
    shares = torch.tensor([density(row[None], key_blocks, tokens, tokens, block_size) for row in counts])
    # A query that attends to text alone has its mass there by right.
    recall = (sparse - dense).exp().nan_to_num(1.0)
    found: dict[str, list[Any]] = {
        "density": [round(float(v), 4) for v in shares[rows.cpu()].mean(0)],
        "recall": [round(float(v), 4) for v in recall.mean((0, 2))],
    }
    if pattern is not None:
        found["row"] = rows[0].tolist()
    return found
