"""All surgery on an exported program: the only file that writes to a graph, its signature or its metadata.

New nodes get their metadata by running the operator on fake tensors and their provenance from the node that they stand
for. Every change is journalled: `Edit.transaction` undoes it when the rewrite raises, `Change.undo` when a quality
budget rolls the site back. Nothing is erased before `finish`, which drops what has become dead and brings the signature
in line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx import Node
from torch.fx.node import map_arg

from ..errors import VerificationError
from ..patterns.graph import GraphView
from ..patterns.nodes import aten, shape_of
from ..torch_private import FakeTensorMode, enable_python_dispatcher
from .change import Change, positions_of, redirect


class Edit:
    """Edits one exported program in place.

    Args:
        exported: A functional program. Its tensors may be shared with other programs; they are never written.
        shared: Tensors by fully qualified name that several phases share; what `buffer` makes is kept there.
    """

    def __init__(self, exported: ExportedProgram, shared: dict[str, Tensor] | None = None) -> None:
        self.exported = exported
        self.graph = exported.graph
        self.shared = shared if shared is not None else {}
        self.provenance: dict[str, str] = {}
        self.shadow = False
        """Let `replace` note what would replace what, without doing it."""
        self._change = Change("edit")
        self._closed: list[Change] = []
        self._touched: set[Node] = set()
        self._view: GraphView | None = None
        self._fake = _fake_mode(exported)

    @property
    def touched(self) -> list[Node]:
        """The calls that were added or got another input and are still there, for the verifier."""
        return [node for node in self.graph.nodes if node.op == "call_function" and node in self._touched]

    @property
    def view(self) -> GraphView:
        """The graph as matchers read it; made anew after the signature changed."""
        if self._view is None:
            self._view = GraphView(self.exported)
        return self._view

    @contextmanager
    def transaction(self, label: str) -> Iterator[Change]:
        """Group edits into one change; when the body raises, the graph is what it was."""
        change = Change(label)
        outer, self._change = self._change, change
        try:
            yield change
        except BaseException:
            change.undo()
            raise
        finally:
            self._change = outer
        if not self.shadow:
            self._closed.append(change)

    def current(self, node: Node) -> Node:
        """What stands for a node now: its replacement, where a transaction that is closed replaced it.

        Sites are matched before any of them is rewritten, so the input of one may be the output of another.
        """
        for change in self._closed:
            for old, new, _ in () if change.undone else change.redirected:
                node = new if node is old else node
        return node

    def call(self, target: Any, *args: Any, like: Node, before: Node | None = None, **kwargs: Any) -> Node:
        """Insert a call.

        Args:
            target: An operator (`torch.ops...`).
            args: Nodes and constants; what an earlier transaction replaced is read from its replacement.
            like: The node whose module path and source line the new one inherits.
            before: Where to insert; `like` by default.
            kwargs: As `args`.

        Returns:
            The new node, with `meta["val"]` computed on fake tensors.
        """
        inputs, named = map_arg((args, kwargs), self.current)
        with self.graph.inserting_before(before or like):
            node = self.graph.call_function(target, inputs, named)
        for key in ("nn_module_stack", "stack_trace", "torch_fn"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        if self.provenance:
            node.meta["graphwright"] = dict(self.provenance)
        self._change.added.append(node)
        self._touched.add(node)
        node.meta["val"] = self.fake_value(node)
        return node

    def size(self, target: Any, *values: Any, like: Node) -> Any:
        """Arithmetic on sizes: done at once where all are numbers, inserted as a call where one is a node."""
        return self.call(target, *values, like=like) if any(isinstance(v, Node) for v in values) else target(*values)

    def size_of(self, size: Any, like: Node) -> Any:
        """A size as an operator argument: a number as it is, a symbol as a node that reads it off an earlier tensor.

        Raises:
            VerificationError: No tensor before `like` has a dimension of this size.
        """
        if isinstance(size, int):
            return size
        for node in self.graph.nodes:
            if node is like:
                break
            for dim, length in enumerate(shape_of(node)):
                if isinstance(length, torch.SymInt) and length.node.expr == size.node.expr:
                    return self.call(aten.sym_size.int, node, dim, like=like)
        raise VerificationError(f"no tensor before {like.name} has a dimension of {size}")

    def fake_value(self, node: Node) -> Any:
        """What a node's metadata should be, from its inputs' metadata."""
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        assert callable(node.target)
        with self._fake, enable_python_dispatcher(), torch.no_grad():
            return node.target(*args, **kwargs)

    def replace(self, old: Node, new: Node) -> None:
        """Let every user of `old` (outputs included) read `new` instead."""
        if self.shadow:
            self._change.redirected.append((old, new, {}))
            return
        users = {user: positions_of(user, old) for user in old.users if user is not new}
        for user, positions in users.items():
            redirect(user, old, new, positions)
        self._touched.update(users)
        self._change.redirected.append((old, new, users))

    def refresh(self, node: Node) -> None:
        """Recompute a call's metadata after its inputs changed."""
        node.meta["val"] = self.fake_value(node)
        node.meta.pop("tensor_meta", None)
        self._touched.add(node)

    def set_sizes(self, node: Node, sizes: list[Any]) -> None:
        """Give an input other sizes; the caller refreshes what reads it."""
        value = node.meta["val"]
        with self._fake:
            node.meta["val"] = torch.empty(sizes, dtype=value.dtype, device=value.device)

    def erase(self, node: Node) -> None:
        """Erase a call that nothing uses, such as an assertion. Not undone by a transaction."""
        self.graph.erase_node(node)

    def buffer(self, name: str, make: Callable[[], Tensor]) -> Node:
        """A placeholder for a stored tensor, made once whatever the number of phases and sites that ask for it.

        Args:
            name: Fully qualified name of the new buffer.
            make: Computes the tensor, called only where no phase has made it yet.
        """
        for node in self.graph.find_nodes(op="placeholder"):
            if self.view.target(node) == name:
                return node
        if name not in self.shared:
            self.shared[name] = make()
        return self._add_placeholder(name, self.shared[name])

    def state(self, name: str, make: Callable[[], Tensor]) -> Node:
        """A placeholder for a stored tensor that the program is to write; `keep` says what is written.

        Unlike what `buffer` makes, each program has its own. The tensor holds what the state is before the first call.
        """
        for node in self.graph.find_nodes(op="placeholder"):
            if self.view.target(node) == name:
                return node
        return self._add_placeholder(name, make())

    def keep(self, old: Node, buffer: Node, value: Node) -> None:
        """Let the program keep `value` in the state `buffer`, instead of what it kept so far of the value `old`.

        The buffer that `old` was kept in is no state any more; unless something else reads it, `finish` drops it.

        Raises:
            VerificationError: The program does not keep `old`, or keeps it twice.
        """
        output, specs = self.graph.output_node(), self.exported.graph_signature.output_specs
        values = output.args[0]
        assert isinstance(values, list | tuple)
        mutations = [i for i, spec in enumerate(specs) if spec.kind is OutputKind.BUFFER_MUTATION]
        places = [i for i in mutations if values[i] is old]
        if len(places) != 1:
            raise VerificationError(f"{old.name} is kept in {len(places)} buffers, expected one")
        if self.shadow:
            self._change.kept.append((old, value, {}))
            return
        place, before = places[0], specs[places[0]]
        counted = frozenset({sum(isinstance(other, Node) for other in values[:place])})
        redirect(output, old, value, counted)
        specs[place] = OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(value.name), self.view.target(buffer))
        self._change.kept.append((old, value, {output: counted}))
        self._change.restores.append(lambda: specs.__setitem__(place, before))
        self._touched.add(value)
        self._view = None

    def keep_too(self, buffer: Node, value: Node) -> None:
        """Let the program keep `value` in the state `buffer`, besides what it kept so far."""
        if self.shadow:
            return
        output, specs = self.graph.output_node(), self.exported.graph_signature.output_specs
        spec = OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(value.name), self.view.target(buffer))
        # What is kept precedes what is returned; behind the rest of it, so that only what is returned moves.
        place = next((i for i, other in enumerate(specs) if other.kind is OutputKind.USER_OUTPUT), len(specs))

        def counted() -> int:
            return sum(isinstance(other, Node) for other in self._outputs()[: specs.index(spec)])

        output.args = ((*self._outputs()[:place], value, *self._outputs()[place:]),)
        specs.insert(place, spec)
        self._shift(output, counted(), 1)
        self._change.kept.append((value, value, {output: frozenset({counted()})}))

        def remove() -> None:
            place, first = specs.index(spec), counted() + 1
            output.args = ((*self._outputs()[:place], *self._outputs()[place + 1 :]),)
            del specs[place]
            self._shift(output, first, -1)

        self._change.restores.append(remove)
        self._touched.add(value)
        self._view = None

    def _outputs(self) -> tuple[Any, ...]:
        values = self.graph.output_node().args[0]
        assert isinstance(values, list | tuple)
        return tuple(values)

    def _shift(self, output: Node, start: int, by: int) -> None:
        """Let all changes know the outputs from `start` on by their new places."""
        for change in (*self._closed, self._change):
            for _, _, users in (*change.redirected, *change.kept):
                if output in users:
                    users[output] = frozenset(place + by if place >= start else place for place in users[output])

    def _add_placeholder(self, name: str, tensor: Tensor) -> Node:
        placeholders = self.graph.find_nodes(op="placeholder", sort=True)
        specs = self.exported.graph_signature.input_specs
        # Parameters, buffers and constants precede user inputs, in the order of the placeholders.
        position = next((i for i, spec in enumerate(specs) if spec.kind is InputKind.USER_INPUT), len(specs))
        anchor = placeholders[position] if position < len(placeholders) else _first_call(self.graph)
        with self.graph.inserting_before(anchor):
            node = self.graph.placeholder("b_" + name.replace(".", "_"))
        node.meta["val"] = self._fake.from_tensor(tensor, static_shapes=True)
        specs.insert(position, InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True))
        self.exported.state_dict[name] = tensor
        self._change.added.append(node)
        self._view = None
        return node

    def constant(self, node: Node) -> Tensor:
        """The tensor behind a weight placeholder.

        Raises:
            VerificationError: The node is no weight; a pattern should have refused it.
        """
        tensor = self.view.tensor(node)
        if tensor is None:
            raise VerificationError(f"{node.name} is not a stored tensor")
        return tensor

    def finish(self) -> int:
        """Drop dead nodes and weights, align the signature, lint and recompile.

        Returns:
            How many call nodes were dropped.
        """
        dropped = 0
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users and not _is_kept(node):
                self.graph.erase_node(node)
                dropped += 1
        self._drop_unused_weights()
        self._separate_state()
        _align_outputs(self.exported)
        self.graph.lint()
        self.exported.graph_module.recompile()
        self._view = None
        return dropped

    def _drop_unused_weights(self) -> None:
        signature = self.exported.graph_signature
        state = {spec.target for spec in signature.output_specs if spec.kind is OutputKind.BUFFER_MUTATION}
        weights = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        nodes = {node.name: node for node in self.graph.find_nodes(op="placeholder")}
        for spec in list(signature.input_specs):
            node = nodes.get(getattr(spec.arg, "name", ""))
            if node is None or node.users or spec.kind not in weights or spec.target in state:
                continue
            signature.input_specs.remove(spec)
            self.graph.erase_node(node)
            if spec.target is not None and not any(other.target == spec.target for other in signature.input_specs):
                self.exported.state_dict.pop(spec.target, None)
                self.exported.constants.pop(spec.target, None)

    def _separate_state(self) -> None:
        """Copy what more than one buffer becomes: a signature cannot say that of one node."""
        output, seen = self.graph.output_node(), set[Node]()
        values: list[Any] = list(output.args[0])  # pyright: ignore[reportArgumentType] a graph returns a tuple of values
        for position, spec in enumerate(self.exported.graph_signature.output_specs):
            value = values[position]
            if spec.kind is OutputKind.USER_OUTPUT or not isinstance(value, Node):
                continue
            if value in seen:
                values[position] = self.call(aten.clone.default, value, like=value, before=output)
            seen.add(value)
        output.args = (tuple(values),)


def _fake_mode(exported: ExportedProgram) -> FakeTensorMode:
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        mode = getattr(value, "fake_mode", None)
        if mode is not None:
            return mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def _first_call(graph: torch.fx.Graph) -> Node:
    return next(node for node in graph.nodes if node.op != "placeholder")


def _is_kept(node: Node) -> bool:
    """Asserts on tensors and sizes have no users and a purpose; the canonicalizer decides about them by name."""
    return node.op == "call_function" and node.target in ASSERTS


ASSERTS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.msg,
        aten._assert_async.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
        torch.ops.aten._functional_assert_scalar.default,
    }
)


def _align_outputs(exported: ExportedProgram) -> None:
    """Let the output specs name the nodes that the output node returns."""
    values = exported.graph.output_node().args[0]
    assert isinstance(values, list | tuple)
    specs = exported.graph_signature.output_specs
    if len(values) != len(specs):
        raise VerificationError(f"the graph returns {len(values)} values, its signature {len(specs)}")
    for value, spec in zip(values, specs, strict=True):
        if isinstance(value, Node):
            kind = TensorArgument if isinstance(value.meta.get("val"), Tensor) else SymIntArgument
            spec.arg = kind(name=value.name)
        elif not isinstance(spec.arg, ConstantArgument):
            spec.arg = ConstantArgument(name="", value=value)  # pyright: ignore[reportArgumentType]
