"""Give a linear that shares its weight with an embedding a weight of its own.

    h = embedding(E, tokens);  y = linear(norm(h), E)     becomes     h = embedding(E, tokens);  y = linear(norm(h), E')

A rotation writes h R through the embedding and reads it through the head, whose weight also takes the last norm's gain:
one tensor cannot be both. E' equals E. Exact; it costs the memory of one embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from ..patterns.flow import LINEAR
from ..patterns.residual import ResidualStream
from .base import SitePass
from .edit import Edit


@dataclass(frozen=True)
class Untie(SitePass[ResidualStream]):
    """The readers of a stream read no table of its embeddings."""

    name: ClassVar[str] = "untie"
    exact: ClassVar[bool] = True
    ensures: ClassVar[str] = "canonical"

    def guard(self, site: ResidualStream, edit: Edit) -> str | None:
        """There must be something to untie."""
        return None if _tied(site) else "no reader of the stream shares its weight with an embedding"

    def rewrite(self, site: ResidualStream, edit: Edit) -> None:
        """Copy the table."""
        for linear in _tied(site):
            source, weight, *bias = linear.args
            assert isinstance(weight, Node)

            def copied(weight: Node = weight) -> object:
                return edit.constant(weight).detach().clone()

            own = edit.buffer(f"{edit.view.target(weight)}.untied", copied)  # pyright: ignore[reportArgumentType]
            edit.replace(linear, edit.call(LINEAR, source, own, *bias, like=linear))


def _tied(site: ResidualStream) -> list[Node]:
    tables = [embedding.args[0] for embedding in site.embeddings]
    return [linear for linear in site.readers if linear.args[1] in tables]
