"""Kernels of a manifest, and what their PTX takes."""

from __future__ import annotations

import re


def entry_parameters(ptx, entry):
    return re.search(rf"\.entry {entry}\(([^)]*)\)", ptx)[1].split(",")


def kernels_of(manifest):
    return [
        kernel
        for plugin in manifest["plugins"]
        for tactic in plugin["tactics"]
        for kernel in tactic["kernels"].values()
    ]
