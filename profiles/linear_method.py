"""What methods of linears have in common: the roles that they take, and the modules that the user leaves out."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, Field

from ..patterns.linear import LinearSite, Role
from .method import Method

DECODER_ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "other")
"""All but the vocabulary projection (`head`)."""


def known_roles(roles: Any) -> Any:
    """The roles, or the keys of a mapping of them; a validator."""
    for role in roles:
        if role not in get_args(Role):
            raise ValueError(f"unknown role {role!r}; there are {', '.join(get_args(Role))}")
    return roles


Roles = Annotated[tuple[str, ...], AfterValidator(known_roles)]
"""Roles of linears, as an option; a name that is none is refused."""


class LinearMethod(Method):
    """A method that rewrites linears one by one."""

    skip: tuple[str, ...] = Field((), description="Module paths, or ends of module paths, to leave as they are.")

    def left_out(self, site: LinearSite, roles: Collection[str]) -> str:
        """Why the options leave a site as it is; "" where they do not."""
        if site.role not in roles:
            return f"role {site.role} is not asked for"
        path = site.module_path
        for skipped in self.skip:
            if path == skipped or path.endswith(f".{skipped}"):
                return f"skipped by option: {skipped}"
        return ""
