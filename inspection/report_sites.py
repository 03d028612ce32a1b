"""Sites as a tree of modules: where in the model each one is, with its facts and source line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.text import Text
from rich.tree import Tree

from ..patterns.find import Sites
from ..patterns.site import Site


@dataclass
class _Module:
    """A module with the sites in it and the modules below it."""

    name: str
    sites: list[Site] = field(default_factory=list)
    below: dict[str, _Module] = field(default_factory=dict)


def site_tree(phase: str, sites: Sites, *, every: bool = False) -> Tree:
    """The sites of one phase by module.

    Args:
        phase: Its name.
        sites: Its sites.
        every: Show layers that are alike one by one; by default a run of them is shown once.
    """
    root = _Module("")
    for site in sites.all:
        module = root
        for part in filter(None, site.module_path.split(".")):
            module = module.below.setdefault(part, _Module(part))
        module.sites.append(site)
    counts = {family: len(getattr(sites, family)) for family in ("attention", "linear", "cache", "norm", "residual")}
    found = ", ".join(f"{number} {family}" for family, number in counts.items() if number) or "no sites"
    tree = Tree(Text(f"{phase}: {found}"))
    _grow(tree, root, every)
    return tree


def _grow(tree: Tree, module: _Module, every: bool) -> None:
    for site in module.sites:
        tree.add(_line(site))
    for names, below in _runs(list(module.below.values()), every):
        while len(below.below) == 1 and not below.sites:  # a module that only holds another is no level of its own
            (below,) = below.below.values()
            names = f"{names}.{below.name}"
        if len(below.sites) == 1 and not below.below:
            tree.add(Text.assemble((names, "bold"), "  ", _line(below.sites[0])))
        else:
            _grow(tree.add(Text(names, style="bold")), below, every)


def _line(site: Site) -> Text:
    own = f"{site.module_path}."  # a weight of the module's own needs no naming
    facts = ", ".join(f"{name} {value}" for name, value in site.describe().items() if not value.startswith(own))
    kind, line = site.id.rsplit("/", 1)[-1], site.source.partition(" ")[0]
    return Text.assemble((kind, "cyan"), f"  {facts}" if facts else "", (f"  {line}" if line else "", "dim"))


def _runs(modules: Sequence[_Module], every: bool) -> Iterable[tuple[str, _Module]]:
    """Numbered neighbours that hold the same, as one."""
    at = 0
    while at < len(modules):
        end = at + 1
        if not every and modules[at].name.isdigit():
            first = _shape(modules[at])
            while end < len(modules) and modules[end].name.isdigit() and _shape(modules[end]) == first:
                end += 1
        alike = f" to {modules[end - 1].name} ({end - at} alike)" if end - at > 1 else ""
        yield modules[at].name + alike, modules[at]
        at = end


def _shape(module: _Module) -> tuple[object, ...]:
    """What two modules must share to be shown as one: kinds and facts, whatever the numbers of layers in them."""
    facts = tuple(
        (site.kind, tuple((name, re.sub(r"(?<=[._])\d+\b", "#", value)) for name, value in site.describe().items()))
        for site in module.sites
    )
    return facts, tuple((name, _shape(below)) for name, below in module.below.items())
