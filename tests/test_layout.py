"""The repository root is the package: what keeps that safe, and the direction of the imports."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {  # what each folder may import, beside itself and GROUND
    "kernels": set(),
    "patterns": set(),
    "passes": {"kernels", "patterns"},
    "lowering": {"archive", "inputs", "kernels", "passes", "patterns", "phases"},
    "profiles": {"kernels", "passes", "patterns"},
    "html_report": {"kernels", "passes", "patterns", "program"},
    "inspection": {"build", "capture", "passes", "patterns", "prepare", "profiles", "program"},
}
GROUND = {"errors", "progress", "replace_files", "torch_private"}
PROGRAMS = ("examples", "benchmarks")
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc"}


def modules(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def package() -> list[Path]:
    return sorted(ROOT.glob("*.py")) + modules(*FLOORS)


def test_python_started_in_the_root_imports_its_neighbours():
    # `python -c` puts the working folder first on the path, so `kernels` shadows the package that transformers looks
    # for; it looks when a model is imported.
    wanted = "import transformers, diffusers; transformers.LlamaForCausalLM, diffusers.WanTransformer3DModel"
    shadowed = "import sys; assert sys.modules['kernels'].__path__ == [sys.argv[1]]"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [sys.executable, "-c", f"{wanted}; {shadowed}", str(ROOT / "kernels")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", FLOORS)
def test_init_holds_a_docstring_and_nothing_else(folder):
    tree = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


@pytest.mark.parametrize("folder", FLOORS)
def test_imports_go_down_only(folder):
    allowed = {folder, *FLOORS[folder], *GROUND}
    found = {f"{path.relative_to(ROOT)} imports {name}" for path in modules(folder) for name in own_imports(path)}
    assert {line for line in found if line.split(" imports ")[1] not in allowed} == set()


def test_imports_are_relative_inside_the_package_and_absolute_in_programs():
    wrong = {path for path in package() for name, level in imports(path) if not level and is_own(name)}
    wrong |= {path for path in modules(*PROGRAMS) for _, level in imports(path) if level}
    assert {str(path.relative_to(ROOT)) for path in wrong} == set()


def test_private_names_of_torch_are_in_one_module():
    found = {
        f"{path.relative_to(ROOT)} uses {name}"
        for path in [*package(), *modules(*PROGRAMS)]
        if path != ROOT / "torch_private.py"
        for name in private_names(path.read_text(encoding="utf-8"), kernel=path.parent == ROOT / "kernels")
    }
    assert found == set()


def test_files_have_names():
    named = [*package(), *modules(*PROGRAMS, "tests")]
    assert len(named) > 50
    assert {str(path.relative_to(ROOT)) for path in named if path.stem in NAMELESS} == set()


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import torch._dynamo", {"torch._dynamo"}),
        ("from torch._export.verifier import Verifier", {"torch._export.verifier.Verifier"}),
        ("from torch.utils import _pytree as pytree", {"torch.utils._pytree"}),
        ("import torch\ndef f(x: torch._ops.OpOverload): ...", {"torch._ops.OpOverload"}),
        ("import torch.nn.functional as F\nF._pad(1)", {"torch.nn.functional._pad"}),
        ("import torch\ny = torch._int_mm(a, b).sum()", {"torch._int_mm"}),
        ("import torch\ny = torch.ops.aten._softmax.default", set()),
        ("from torch.fx.experimental.symbolic_shapes import ShapeEnv\nprint(torch.__version__)", set()),
        ("import numpy\nnumpy._core", set()),
    ],
)
def test_private_names_are_found(code, names):
    assert private_names(code, kernel=False) == names


def test_kernels_may_call_private_operators_only():
    calls = "import torch\ntorch._int_mm(a, b)\n"
    assert private_names(calls, kernel=True) == set()
    others = {"torch._ops.OpOverload", "torch._C._foo", "torch._int_mm"}
    assert private_names("import torch\ntorch._C._foo()\nt: torch._ops.OpOverload\nf = torch._int_mm", True) == others


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Each name that a module imports, anywhere in it, with the level of the import: 0 where it is absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = f"{node.module}." if node.module else ""
            yield from ((f"{prefix}{alias.name}", node.level) for alias in node.names)


def is_own(name: str) -> bool:
    """Whether an absolute import means graphwright, or one of its folders taken for a package of its own."""
    return name.split(".")[0] in {"graphwright", *FLOORS, *PROGRAMS}


def own_imports(path: Path) -> set[str]:
    """The folders and root modules of graphwright that a module imports."""
    folder = path.relative_to(ROOT).parent.parts
    found = set()
    for name, level in imports(path):
        parts = name.split(".")
        if level:
            parts = [*folder[: len(folder) - level + 1], *parts]
        elif parts[0] == "graphwright":
            parts = parts[1:]
        elif not is_own(name):
            continue
        found.add(parts[0])
    return found


def private_names(code: str, kernel: bool) -> set[str]:
    """The underscored names under `torch` that code imports or reads; for a kernel, without calls of `torch._name`."""
    tree = ast.parse(code)
    origin = {"torch": "torch"}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            origin |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            origin |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            name = dotted(node, origin)
            if not (kernel and id(node) in called and name.count(".") == 1):
                found.add(name)
    return {name for name in found if is_private(name)}


def dotted(node: ast.Attribute, origin: dict[str, str]) -> str:
    """The full name of a chain of attributes, empty where it does not start at an imported name."""
    parts = []
    value: ast.expr = node
    while isinstance(value, ast.Attribute):
        parts.append(value.attr)
        value = value.value
    if not isinstance(value, ast.Name) or value.id not in origin:
        return ""
    return ".".join([origin[value.id], *reversed(parts)])


def is_private(name: str) -> bool:
    parts = name.split(".")
    underscored = any(part.startswith("_") and not part.endswith("__") for part in parts)
    return parts[0] == "torch" and parts[1:2] != ["ops"] and underscored
