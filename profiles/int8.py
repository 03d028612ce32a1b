"""Int8: linears in W8A8, dynamic. The plainest method, and the template for the others.

Weights int8 per output channel, activations int8 per token when the program runs, both symmetric (Dettmers et al. 2022,
"LLM.int8()", section 2: vector-wise quantization, here without its outlier decomposition; sites that do not bear it are
found by the quality budget and rolled back).
"""

from __future__ import annotations

from typing import ClassVar, get_args

from pydantic import Field, field_validator

from ..passes.decision import Decision
from ..patterns.linear import LinearSite, Role
from .method import Context, Method


class Int8(Method):
    """Replace linears by dynamic int8 ones."""

    name: ClassVar[str] = "int8"
    reference: ClassVar[str] = "Dettmers et al. 2022, arXiv 2208.07339, section 2 (vector-wise quantization)"
    rewrites: ClassVar[str] = "linears, W8A8 dynamic"

    roles: tuple[str, ...] = Field(
        ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "other"),
        description="Roles to quantize. The vocabulary projection (`head`) is left out unless it is named here.",
    )
    skip: tuple[str, ...] = Field((), description="Module paths, or ends of module paths, to leave as they are.")

    @field_validator("roles")
    @classmethod
    def _known(cls, roles: tuple[str, ...]) -> tuple[str, ...]:
        for role in roles:
            if role not in get_args(Role):
                raise ValueError(f"unknown role {role!r}; there are {', '.join(get_args(Role))}")
        return roles

    def decide(self, context: Context) -> list[Decision]:
        """Propose every linear whose role is asked for; the gain is its share of the phase's linear arithmetic."""
        decisions = []
        for sites in context.sites.values():
            total = sum(_weight(site) for site in sites.linear) or 1
            for site in sites.linear:
                reason = self._declined(site)
                decisions.append(
                    Decision(
                        site=site.id,
                        method=self.name,
                        pass_name="quantize_linear",
                        status="refused" if reason else "proposed",
                        reason=reason,
                        facts=site.describe(),
                        predicted_gain=_weight(site) / total,
                    )
                )
        return decisions

    def _declined(self, site: LinearSite) -> str:
        if site.role not in self.roles:
            return f"role {site.role} is not asked for"
        path = site.module_path
        for skipped in self.skip:
            if path == skipped or path.endswith(f".{skipped}"):
                return f"skipped by option: {skipped}"
        return ""


def _weight(site: LinearSite) -> int:
    return site.in_features * site.out_features
