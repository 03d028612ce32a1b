"""What an operator accepts, in one place that the operator itself, every rewrite and every lowering ask.

A contract gives each tensor argument its dtypes and a shape in letters, and each letter its limits:

    Contract(
        "int8_linear",
        {"x": Argument("... K", FLOATS), "weight": Argument("N K", (torch.int8,))},
        sizes={"K": Size(minimum=1, maximum=131072)},
        capability=(8, 0),
    ).check(x=node.meta["val"], weight=Spec((64, 32), torch.int8))

Equal letters are equal sizes, ``1|B`` is 1 or B, ``...`` is any number of leading dimensions. ``check`` answers
``None`` or the reason, so that a pass can refuse a site with it; ``require`` raises it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import InvalidArgument, MissingKernel
from ..torch_private import OpOverload

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class TensorLike(Protocol):
    """What a contract looks at: tensors, fake tensors (``node.meta["val"]``) and :class:`Spec` all have it."""

    @property
    def shape(self) -> Sequence[int]:
        """Sizes, symbolic ones too."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        ...


class Spec(NamedTuple):
    """Shape and dtype of a tensor that a rewrite would make and has not made yet."""

    shape: Sequence[int]
    dtype: torch.dtype


@dataclass(frozen=True)
class Argument:
    """A tensor argument: its shape in letters (``"... N K"``), its dtypes, and whether it may be ``None``."""

    shape: str
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


@dataclass(frozen=True)
class Size:
    """Limits of a size or an integer argument; ``multiple_of`` is a number or another letter."""

    minimum: int = 0
    maximum: int | None = None
    multiple_of: int | str = 1
    one_of: tuple[int, ...] = ()


@dataclass(frozen=True)
class Contract:
    """The arguments that an operator accepts, and the least CUDA capability that its Triton kernel runs on."""

    operator: str
    arguments: Mapping[str, Argument]
    sizes: Mapping[str, Size] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "cuda")
    capability: tuple[int, int] = (8, 0)

    def check(
        self,
        *,
        device: torch.device | str | None = None,
        capability: tuple[int, int] | None = None,
        proved: bool = True,
        **arguments: TensorLike | int | None,
    ) -> str | None:
        """The first reason why the operator cannot take these arguments there, or ``None``.

        Args:
            device: Where it would run; unset, devices are not looked at.
            capability: CUDA capability of that device; unset, it is asked of the device where there is one.
            proved: Whether a relation between symbolic sizes that is not provable is a reason. No guard is ever added.
            arguments: The tensors by the contract's names, and integer arguments by their letters in ``sizes``.
        """
        if device is not None and (reason := self.check_device(torch.device(device), capability)):
            return reason
        bound: dict[str, tuple[int, str]] = {}
        for name, value in arguments.items():
            if name not in self.arguments:
                if not isinstance(value, int | torch.SymInt):
                    return f"got an argument {name}, expected {', '.join((*self.arguments, *self.sizes))}"
                bound[name] = (value, name)
        for name, argument in self.arguments.items():
            if (reason := _check_argument(name, argument, arguments.get(name), bound, proved)) is not None:
                return reason
        for letter, size in self.sizes.items():
            if letter in bound and (reason := _check_size(letter, size, bound, proved)) is not None:
                return reason
        return None

    def require(self, **arguments: Any) -> None:
        """``check``, with the reason raised as :class:`InvalidArgument`."""
        if (reason := self.check(**arguments)) is not None:
            raise InvalidArgument(f"{self.operator}: {reason}")

    def check_device(self, device: torch.device, capability: tuple[int, int] | None = None) -> str | None:
        """The reason why the operator has no kernel on ``device``, or ``None``; ``capability`` as in ``check``."""
        if device.type not in self.devices:
            return f"got device {device.type}, expected {' or '.join(self.devices)}"
        if device.type != "cuda":
            return None
        if capability is None and torch.cuda.is_available():
            capability = torch.cuda.get_device_capability(device)
        if capability is not None and capability < self.capability:
            got, expected = (".".join(map(str, pair)) for pair in (capability, self.capability))
            return f"got CUDA capability {got}, expected at least {expected}"
        return None

    @contextmanager
    def on_cuda(self, device: torch.device) -> Iterator[None]:
        """Where a Triton kernel is launched: `device` is the current one.

        Raises:
            MissingKernel: There is no Triton, or the device is not one that the kernel runs on.
        """
        known = (self.operator, device)
        if known not in _ON_CUDA:
            triton = find_spec("triton") is not None
            _ON_CUDA[known] = self.check_device(device) if triton else "triton is not installed (pip install triton)"
        if (reason := _ON_CUDA[known]) is not None:
            raise missing_kernel(self.operator, device, reason)
        with torch.cuda.device(device):
            yield

    def requirement(self, further: Callable[[Mapping[str, Any]], str | None] | None = None) -> Callable[..., None]:
        """`require` for an operator that is called often: what was checked once is remembered by shapes and dtypes.

        Args:
            further: The reason against what letters cannot say, or None; it gets the specs of all arguments by name.

        Returns:
            A function of the tensors, in the contract's order, of integer arguments by their letters, and of `proved`
            as in `check`. A decode step of a linear is as short as 20 us, a check takes 10.
        """

        def check(specs: tuple[Spec | None, ...], sizes: tuple[tuple[str, int], ...], proved: bool) -> None:
            arguments = {**dict(zip(self.arguments, specs, strict=True)), **dict(sizes)}
            self.require(**arguments, proved=proved)
            if further is not None and (reason := further(arguments)) is not None:
                raise InvalidArgument(f"{self.operator}: {reason}")

        remembered = lru_cache(maxsize=1024)(check)

        def require(*tensors: Tensor | None, proved: bool = True, **sizes: int) -> None:
            specs = tuple(None if tensor is None else Spec(tensor.shape, tensor.dtype) for tensor in tensors)
            # What is not proved may be symbolic, and symbols are not compared without a guard.
            (remembered if proved else check)(specs, tuple(sizes.items()), proved)

        return require


_ON_CUDA: dict[tuple[str, torch.device], str | None] = {}
"""(operator, device) -> why its Triton kernel cannot run there, None where it can."""


@dataclass(frozen=True)
class Operator:
    """What a reader of a graph or a lowering needs to know of an operator."""

    name: str
    overload: OpOverload
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    contract: Contract


OPERATORS: dict[str, Operator] = {}
"""Every operator whose module has been imported, by its name in the namespace ``graphwright``."""


def register(
    overload: OpOverload, reference: Callable[..., Tensor | tuple[Tensor, ...]], contract: Contract
) -> Operator:
    """Enter an operator in ``OPERATORS`` under its contract's name."""
    operator = Operator(contract.operator, overload, reference, contract)
    OPERATORS[operator.name] = operator
    return operator


def missing_kernel(operator: Operator | str, device: torch.device | str, reason: str = "") -> MissingKernel:
    """The error for an operator that has no kernel on ``device``: it names both, why (``reason``), and the way out."""
    name = operator if isinstance(operator, str) else operator.name
    devices = OPERATORS[name].contract.devices if name in OPERATORS else ("cpu", "cuda")
    return MissingKernel(
        f"graphwright::{name} has no kernel for device {str(device)!r}{f': {reason}' if reason else ''}. "
        f"Move the program to {' or '.join(devices)}, or leave the method out that brought this operator in."
    )


def _check_argument(
    name: str, argument: Argument, value: TensorLike | int | None, bound: dict[str, tuple[int, str]], proved: bool
) -> str | None:
    """Check presence, dtype and rank, and bind the shape's letters or compare them with what they are bound to."""
    if value is None or isinstance(value, int):
        expected = f"a tensor [{argument.shape}]"
        return None if value is None and argument.optional else f"got {name}={value}, expected {expected}"
    if value.dtype not in argument.dtypes:
        return f"got {name} of {value.dtype}, expected {' or '.join(map(str, argument.dtypes))}"
    letters = argument.shape.split()
    leading = letters[0] == "..."
    letters = letters[leading:]
    rank = len(value.shape)
    if rank < len(letters) or (rank > len(letters) and not leading):
        return f"got {name} of shape {list(value.shape)}, expected [{argument.shape}]"
    for letter, size in zip(letters, value.shape[rank - len(letters) :], strict=True):
        if letter.startswith("1|"):
            letter = letter[2:]
            if not _fails(size == 1, size != 1, proved):
                continue
        expected, where = bound.setdefault(letter, (size, name))
        if _fails(size == expected, size != expected, proved):
            expected_shape = f"[{argument.shape}] with {letter}={expected} of {where}"
            return f"got {name} of shape {list(value.shape)}, expected {expected_shape}"
    return None


def _check_size(letter: str, limits: Size, bound: Mapping[str, tuple[int, str]], proved: bool) -> str | None:
    size, where = bound[letter]
    got = f"got {letter}={size}" + (f" in {where}" if where != letter else "")
    if _fails(size >= limits.minimum, size < limits.minimum, proved):
        return f"{got}, expected at least {limits.minimum}"
    if limits.maximum is not None and _fails(size <= limits.maximum, size > limits.maximum, proved):
        return f"{got}, expected at most {limits.maximum}"
    if limits.one_of and (size not in limits.one_of if isinstance(size, int) else proved):
        return f"{got}, expected one of {', '.join(map(str, limits.one_of))}"
    multiple = limits.multiple_of
    factor = bound.get(multiple, (1, ""))[0] if isinstance(multiple, str) else multiple
    if factor != 1 and _fails(size % factor == 0, size % factor != 0, proved):
        return f"{got}, expected a multiple of {multiple}" + (f"={factor}" if isinstance(multiple, str) else "")
    return None


def _fails(holds: bool | torch.SymBool, broken: bool | torch.SymBool, proved: bool) -> bool:
    """Whether a relation is false or, if it must be ``proved``, not known to be true; symbols get no guard."""
    if isinstance(holds, bool):
        return not holds
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return not statically_known_true(holds) if proved else statically_known_true(broken)
