"""The command line: each command is a thin layer over a public function.

Errors that graphwright raises on purpose are printed in one line and end with status 2; ctrl-C ends with status 130.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .errors import GraphwrightError, InvalidArgument
from .replace_files import check_writable

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
_console = Console()

Model = Annotated[Path, typer.Argument(help="A .pt2 file written by torch.export.save.")]
Saved = Annotated[Path, typer.Argument(help="A .gw file written by Program.save.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Let torch unpickle the file's sample inputs, which can run code.")
]


@app.command()
def inspect(
    model: Model,
    every: Annotated[bool, typer.Option("--every", help="Show layers that are alike one by one.")] = False,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Show the modules of a program with their sites: attention, linears, caches, norms, and what nearly was one."""
    from .capture import capture
    from .inspection.printable import dump_json
    from .optimize import inspect as find

    inspection = find(capture(model, trust=trust))
    inspection.every = every
    print(dump_json(inspection)) if as_json else _console.print(inspection)


@app.command()
def optimize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the .gw program.")],
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="A method, as name or name:option=value,option=value.")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="Replay this profile instead.")] = None,
    save_profile: Annotated[Path | None, typer.Option(help="Also write the profile here.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Budget: largest relative L2 error of the output.")] = None,
    keep: Annotated[str, typer.Option(help="'faster', or 'smaller' to keep variants for their memory.")] = "faster",
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Rewrite an exported program and save the result."""
    from .capture import capture
    from .inspection.printable import dump_json
    from .optimize import optimize as run
    from .profiles.budget import Budget

    check_writable(output, save_profile)
    methods = [_parse_method(text) for text in method or ()]
    budget = None if max_error is None else Budget(max_error=max_error)
    program = run(capture(model, trust=trust), methods=methods, profile=profile, budget=budget, keep=keep)  # pyright: ignore[reportArgumentType]
    program.save(output)
    if save_profile is not None:
        program.profile.save(save_profile)
    report = program.report()
    print(dump_json(report)) if as_json else _console.print(report)


@app.command()
def report(
    program: Saved,
    as_json: AsJson = False,
    site: Annotated[str | None, typer.Option(help="Explain this site instead.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the page with graphs and pictures here instead.")] = None,
) -> None:
    """Show what was done to a saved program, and why."""
    from .inspection.printable import dump_json
    from .program_file import load

    check_writable(html)
    loaded = load(program)
    if html is not None:
        print(loaded.html(html))
        return
    if site is not None:
        print(loaded.explain(site))
        return
    print(dump_json(loaded.report())) if as_json else _console.print(loaded.report())


@app.command()
def explain(
    program: Saved,
    site: Annotated[str, typer.Argument(help="A site id, as `report --json` lists them, or a module path.")],
) -> None:
    """Show the whole chain of one site: match, guard, decision, passes, figures, source line."""
    from .program_file import load

    print(load(program).explain(site))


@app.command()
def diff(
    program: Saved,
    other: Annotated[Path | None, typer.Argument(help="Another .gw file; without it, before and after.")] = None,
    phase: Annotated[str, typer.Option(help="Which phase's graph; of one program the first by default.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show a phase's graph before and after the lossy rewrites, or how two programs differ."""
    from .inspection.printable import dump_json
    from .inspection.report_diff import ProgramDiff
    from .program_file import load

    loaded = load(program)
    if other is None:
        print(loaded.diff(phase or next(iter(loaded.phases))))
        return
    compared = ProgramDiff(loaded, load(other))
    if phase:
        print(compared.graph(phase))
        return
    print(dump_json(compared)) if as_json else _console.print(compared)


@app.command()
def bisect(
    program: Saved,
    against: Annotated[Path, typer.Option(help="The model: a .pt2 file, or a .gw file made without methods.")],
    tolerance: Annotated[float, typer.Option(help="Largest relative L2 error of the outputs.")],
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Find the first pass or site that breaks a program's numbers. Status 1 if there is one."""
    from .inspection.bisection import bisect as run
    from .inspection.printable import dump_json
    from .program_file import load

    loaded = load(program)
    found = run(loaded, load(against) if against.suffix == ".gw" else against, tolerance=tolerance, trust=trust)
    print(dump_json(found)) if as_json else _console.print(found)
    if found.kind != "none":
        raise typer.Exit(1)


@app.command()
def graph(
    program: Saved,
    phase: Annotated[str, typer.Option(help="Which phase; the first by default.")] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .graphml, .dot, .txt or .pt2 file instead of the terminal.")
    ] = None,
) -> None:
    """Print a phase's graph with shapes, or write it for another viewer such as netron."""
    from .program_file import load

    loaded = load(program)
    name = phase or next(iter(loaded.phases))
    check_writable(output)
    print(loaded.write_graph(name, output) if output is not None else loaded.graph(name))


@app.command()
def export(
    program: Saved,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="What to write: .onnx, .pt2 for AOTInductor, .engine for TensorRT-RTX, .zip for TensorRT.",
        ),
    ],
    ops: Annotated[str, typer.Option(help="Operators in ONNX: 'portable', 'ort' or 'function'.")] = "portable",
    opset: Annotated[int, typer.Option(help="ONNX opset: 23 or 24.")] = 23,
    capability: Annotated[
        list[str] | None, typer.Option(help="What an .engine runs on, such as sm_89; for a .zip sm_80, sm_89 or sm_90.")
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(help="A dynamic size of engines: INPUT:DIMENSION=LEAST,USUAL,LARGEST; the captured ones else."),
    ] = None,
    tf32: Annotated[bool, typer.Option(help="Let engines round factors of float32 products.")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say what each operator would become.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a saved program as files that run without graphwright."""
    from .export import dry_run
    from .inspection.printable import dump_json
    from .program_file import load

    if dry:
        made = dry_run(load(program), output, ops)
        print(dump_json(made)) if as_json else _console.print(made)
        return
    check_writable(output)
    options: dict[str, Any] = {"ops": ops, "opset": opset} if output.suffix == ".onnx" else {}
    capabilities = {".engine": "compute_capabilities", ".zip": "architectures"}.get(output.suffix)
    if capabilities is not None:
        options = {"sizes": _parse_sizes(size or ()), "tf32": tf32} | ({capabilities: capability} if capability else {})
    files = load(program).export(output, **options)
    sizes = {str(file): file.stat().st_size for file in files}
    print(json.dumps(sizes) if as_json else "\n".join(f"{name}  {size / 1e6:.1f} MB" for name, size in sizes.items()))


@app.command()
def bench(
    which: Annotated[
        str,
        typer.Argument(help="'spine': SmolLM2 and the int8 linear; 'video', 'reuse': attention of a small Wan."),
    ] = "spine",
    as_json: AsJson = False,
    quick: Annotated[bool, typer.Option(help="Fewer repeats and smaller inputs; figures are rougher.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for what a table leaves.")] = Path("."),
) -> None:
    """Measure the figures of benchmarks/README.md anew: one thread, A and B in turn, minima."""
    from .benchmarks.run import run_table

    run_table(which, as_json=as_json, quick=quick, output=output, console=_console)


@app.command()
def demo(
    layers: Annotated[int | None, typer.Option(help="Use only this many layers of the model.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens for the perplexity.")] = 4,
    page: Annotated[Path, typer.Option(help="Where to write the page; its folder is made.")] = Path("out/demo.html"),
) -> None:
    """Optimize SmolLM2-135M with Int8: report, text, figures before and after, and the page of the result."""
    from .examples.demo import run_demo

    run_demo(_console, layers=layers, windows=windows, page=page)


@app.command()
def methods() -> None:
    """List the methods with their options."""
    from .inspection.tables import Table
    from .profiles.method import methods as known

    table = Table("method", "rewrites", "options", "reference")
    for name, kind in known().items():
        options = ", ".join(f"{field}={info.default!r}" for field, info in kind.model_fields.items())
        table.add_row(name, kind.rewrites, options, kind.reference)
    _console.print(table)


@app.command()
def presets() -> None:
    """List the published settings of well-known models; use one with `-m NAME`."""
    from .inspection.tables import Table
    from .profiles.presets import presets as known

    table = Table("preset", "model", "options", "published figures", "source", "run here")
    for name, preset in known().items():
        options = ", ".join(f"{option}={value!r}" for option, value in preset.options.items())
        table.add_row(
            name, preset.model, options, preset.published, preset.source, "yes" if preset.verified else preset.reason
        )
    _console.print(table)


def _parse_method(text: str) -> Any:
    """`int8:roles=[q,k],skip=[]`, or a preset's name, to a method; values are JSON, bare words are strings."""
    from .profiles.method import method_named
    from .profiles.presets import preset

    name, _, rest = text.partition(":")
    if "/" in name and not rest:
        return preset(name)
    options: dict[str, Any] = {}
    for part in _split(rest):
        key, equals, value = part.partition("=")
        if not equals:
            raise InvalidArgument(f"method option {part!r} is not name=value")
        options[key.strip()] = _parse_value(value.strip())
    return method_named(name, options)


def _parse_sizes(texts: Iterable[str]) -> dict[str, dict[int, tuple[int, ...]]]:
    """`input_ids:1=1,16,512` to {"input_ids": {1: (1, 16, 512)}}."""
    made: dict[str, dict[int, tuple[int, ...]]] = {}
    for text in texts:
        match = re.fullmatch(r"([\w.]+):(\d+)=(\d+),(\d+),(\d+)", text)
        if match is None:
            raise InvalidArgument(f"size {text!r} is not INPUT:DIMENSION=LEAST,USUAL,LARGEST")
        name, *numbers = match.groups()
        dimension, *given = map(int, numbers)
        made.setdefault(name, {})[dimension] = tuple(given)
    return made


def _split(text: str) -> list[str]:
    """Split at commas that are outside brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [part for part in (*parts, text[start:]) if part]


def _parse_value(text: str) -> Any:
    if text.startswith(("[", "(")):
        return tuple(_parse_value(item.strip()) for item in _split(text[1:-1]))
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> None:
    """Entry point of the `graphwright` command."""
    try:
        status = app(standalone_mode=False)
        if isinstance(status, int):  # what a command exits with is returned in this mode, not raised
            sys.exit(status)
    except GraphwrightError as error:
        print(f"graphwright: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("graphwright: interrupted", file=sys.stderr)
        sys.exit(130)
    except (typer.Exit, SystemExit) as stop:
        sys.exit(getattr(stop, "exit_code", getattr(stop, "code", 0)))
    except typer.Abort:
        print("graphwright: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            format_message = getattr(error, "format_message", None)
            message = format_message() if format_message is not None else str(error)
            print(f"graphwright: {message}", file=sys.stderr)
            sys.exit(2)
        raise
