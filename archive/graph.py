"""One exported program as JSON, and back, without its tensors.

Torch has a JSON form of its own (``torch._export.serde``). It is not used here because a file in it can run code when
it is loaded: names of operators are resolved by ``getattr`` from ``torch`` downwards, sizes by ``sympy.sympify`` (which
evaluates text), guards are Python source that ``ExportedProgram.module()`` compiles, and the names of nodes and
arguments reach generated code unchecked. It also adds and reorders the outputs of nodes with several of them.

Here every name that can reach generated code is an identifier, every operator is one that torch has registered in a
namespace of the list below, and every size is built from a table of functions (``archive/symbols.py``). Guards are not
stored; the ranges of sizes are, and hold after loading.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature

from ..errors import InvalidFile
from ..torch_private import CallMethodKey, ConvertIntKey, DivideByKey, TrainingIRVerifier, Verifier, pytree
from .operators import read_argument, read_operator, write_argument, write_operator
from .signature import identifier, read_call, read_signature, write_call, write_signature
from .symbols import SymbolReader, SymbolWriter, read_text


def write_program(program: ExportedProgram) -> dict[str, Any]:
    """The program as JSON: nodes with operators, arguments, values and metadata; signature; ranges; call structure.

    Kept of a node's metadata: ``val``, ``stack_trace``, ``nn_module_stack``, ``torch_fn``, ``unbacked_bindings``,
    ``graphwright``, and ``custom`` where it is JSON. Storage offsets and sharing between values are not kept.

    Raises:
        InvalidFile: The program holds something that has no safe form: a submodule (control flow), a custom object,
            an operator of a foreign namespace, an unregistered container. The message names the node.
    """
    writer = _GraphWriter()
    nodes = [writer.node(node) for node in program.graph.nodes]
    symbols = writer.symbols
    ranges = [
        [
            writer.symbols.expression(symbol, None),
            writer.symbols.bound(bounds.lower),
            writer.symbols.bound(bounds.upper),
        ]
        for symbol, bounds in program.range_constraints.items()
    ]
    return {
        "dialect": _dialect(program),
        "symbols": symbols.table,
        "ranges": ranges,
        "traces": list(writer.traces),
        "stacks": [json.loads(stack) for stack in writer.stacks],
        "nodes": nodes,
        "signature": write_signature(program.graph_signature),
        "call": write_call(program),
    }


def read_program(
    document: Mapping[str, Any], state_dict: dict[str, torch.Tensor], constants: dict[str, torch.Tensor]
) -> ExportedProgram:
    """The program that ``write_program`` wrote, over the given tensors, validated; it has no example inputs.

    Raises:
        InvalidFile: The document names an operator that is not registered or not allowed, a name that is not an
            identifier, an unknown function of sizes, or is otherwise not what ``write_program`` writes.
    """
    verifier = _DIALECTS.get(document["dialect"])
    if verifier is None:
        raise InvalidFile(f"unknown dialect {document['dialect']!r}")
    symbols = SymbolReader(document["symbols"])
    reader = _GraphReader(symbols, document["traces"], document["stacks"])
    with symbols.mode:
        for node in document["nodes"]:
            reader.node(node)
    in_spec, out_spec, names, modules = read_call(document["call"])
    ranges = {}
    for data, lower, upper in document["ranges"]:
        size = symbols.expression(data)
        ranges[size] = symbols.range(lower, upper, integer=bool(size.is_integer))
    root = ModuleCallEntry("", ModuleCallSignature([], [], in_spec, out_spec, names))
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=reader.graph,
        graph_signature=read_signature(document["signature"]),
        state_dict=state_dict,
        range_constraints=ranges,
        module_call_graph=[root, *(ModuleCallEntry(fqn) for fqn in modules)],
        constants=dict(constants),
        verifiers=[verifier],
    )


class _GraphWriter:
    def __init__(self) -> None:
        self.symbols = SymbolWriter()
        self.traces: dict[str, int] = {}  # many nodes share a stack trace: each is stored once
        self.stacks: dict[str, int] = {}

    def node(self, node: torch.fx.Node) -> dict[str, Any]:
        try:
            return self._node(node)
        except InvalidFile as error:
            raise InvalidFile(f"node {node.name}: {error}") from error

    def _node(self, node: torch.fx.Node) -> dict[str, Any]:
        if node.op not in _NODE_KINDS:
            raise InvalidFile(f"{node.op} of {node.target} cannot be stored: only flat graphs can")
        target = write_operator(node.target) if node.op == "call_function" else identifier(node.target)
        record: dict[str, Any] = {"name": identifier(node.name), "op": node.op, "target": target}
        if node.args:
            record["args"] = [write_argument(argument) for argument in node.args]
        if node.kwargs:
            record["kwargs"] = {name: write_argument(argument) for name, argument in node.kwargs.items()}
        if "val" in node.meta:
            record["val"] = self.symbols.value(node.meta["val"])
        return record | self._metadata(node.meta)

    def _metadata(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        record: dict[str, Any] = {}
        if trace := meta.get("stack_trace"):
            record["trace"] = self.traces.setdefault(str(trace), len(self.traces))
        if (stack := meta.get("nn_module_stack")) is not None:
            entries = json.dumps([[str(key), str(path), _type_name(kind)] for key, (path, kind) in stack.items()])
            record["stack"] = self.stacks.setdefault(entries, len(self.stacks))
        if function := meta.get("torch_fn"):
            record["torch_fn"] = [str(part) for part in function]
        if bindings := meta.get("unbacked_bindings"):
            record["unbacked"] = [
                [self.symbols.expression(symbol, None), [_write_key(key) for key in path]]
                for symbol, path in bindings.items()
            ]
        if isinstance(custom := _as_json(meta.get("custom")), dict):
            record["custom"] = custom
        if provenance := meta.get("graphwright"):
            record["graphwright"] = _as_json(provenance)
            if not isinstance(record["graphwright"], dict):
                raise InvalidFile(f"meta['graphwright'] is not a mapping of JSON: {provenance!r}")
        return record


class _GraphReader:
    def __init__(self, symbols: SymbolReader, traces: list[str], stacks: list[list[list[str]]]) -> None:
        self.graph = torch.fx.Graph()
        self._symbols = symbols
        self._traces = [read_text(trace) for trace in traces]
        self._stacks = [
            {read_text(key): (read_text(path), read_text(kind)) for key, path, kind in stack} for stack in stacks
        ]
        self._nodes: dict[str, torch.fx.Node] = {}
        self._operators: dict[str, Callable[..., Any]] = {}

    def node(self, record: Mapping[str, Any]) -> None:
        name = identifier(record["name"])
        try:
            self._node(name, record)
        except InvalidFile as error:
            raise InvalidFile(f"node {name}: {error}") from error

    def _node(self, name: str, record: Mapping[str, Any]) -> None:
        kind = record["op"]
        if kind not in _NODE_KINDS:
            raise InvalidFile(f"{kind!r} is not a kind of node")
        if name in self._nodes:
            raise InvalidFile("the name is used twice")
        if kind == "call_function":
            target: Any = self._operator(record["target"])
        else:
            target = identifier(record["target"])
        args = tuple(read_argument(argument, self._nodes) for argument in record.get("args", ()))
        kwargs = {
            identifier(key): read_argument(argument, self._nodes) for key, argument in record.get("kwargs", {}).items()
        }
        node = self.graph.create_node(kind, target, args, kwargs, name=name)
        node.name = name  # fx renames what shadows a builtin (an input named `input`), the signature does not
        self._nodes[name] = node
        node.meta.update(self._metadata(record))

    def _metadata(self, record: Mapping[str, Any]) -> dict[str, Any]:
        meta: dict[str, Any] = {}
        if "val" in record:
            meta["val"] = self._symbols.value(record["val"])
        if "trace" in record:
            meta["stack_trace"] = self._traces[record["trace"]]
        if "stack" in record:
            meta["nn_module_stack"] = dict(self._stacks[record["stack"]])
        if "torch_fn" in record:
            meta["torch_fn"] = tuple(read_text(part) for part in record["torch_fn"])
        if "unbacked" in record:
            meta["unbacked_bindings"] = {
                self._symbols.symbol(symbol): tuple(_read_key(key) for key in path)
                for symbol, path in record["unbacked"]
            }
        for name in ("custom", "graphwright"):
            if name in record:
                meta[name] = dict(record[name])
        return meta

    def _operator(self, target: object) -> Callable[..., Any]:
        if not isinstance(target, str):
            raise InvalidFile(f"{target!r} is not an operator")
        if target not in self._operators:
            self._operators[target] = read_operator(target)
        return self._operators[target]


def _dialect(program: ExportedProgram) -> str:
    for name, verifier in _DIALECTS.items():
        if program.verifiers and program.verifiers[0] is verifier:
            return name
    raise InvalidFile(f"a program verified by {program.verifiers} cannot be stored")


def _type_name(kind: object) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


def _as_json(value: Any) -> Any:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        return None
    return json.loads(text)


def _write_key(key: Any) -> list[Any]:
    if isinstance(key, CallMethodKey) and key.name in _METHODS:
        return ["method", key.name]
    if isinstance(key, pytree.SequenceKey):
        return ["item", key.idx]
    if isinstance(key, DivideByKey) and isinstance(key.divisor, int):
        return ["divide", key.divisor]
    if isinstance(key, ConvertIntKey):
        return ["convert"]
    raise InvalidFile(f"the path {key} to an unbacked symbol cannot be stored")


def _read_key(data: list[Any]) -> Any:
    kind, *arguments = data
    if kind == "method" and arguments[0] in _METHODS:
        return CallMethodKey(arguments[0])
    if kind == "item":
        return pytree.SequenceKey(int(arguments[0]))
    if kind == "divide":
        return DivideByKey(int(arguments[0]))
    if kind == "convert":
        return ConvertIntKey()
    raise InvalidFile(f"unknown path {data} to an unbacked symbol")


_NODE_KINDS = ("placeholder", "call_function", "output")
_DIALECTS = {"ATEN": Verifier, "TRAINING": TrainingIRVerifier}
_METHODS = ("size", "stride", "storage_offset", "item")
