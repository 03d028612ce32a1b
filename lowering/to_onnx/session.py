"""A model in ONNX Runtime: the provider that was asked for or an error, and state that is bound, not copied.

State lies in torch tensors. They are bound as input and output at once where the model writes into its input
(`in_place`); where it does not, two tensors take turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import InvalidArgument, InvalidFile, InvalidType, MissingExtra

if TYPE_CHECKING:
    import onnxruntime

DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}
_ONNX = {  # TensorProto.DataType
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}


def runtime() -> Any:
    """The module onnxruntime, of onnxruntime or onnxruntime-gpu.

    Raises:
        MissingExtra: Neither is installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime is not installed: pip install 'graphwright[onnx]'") from error
    return onnxruntime


def check_provider(provider: str) -> None:
    """Refuse a provider that the installed runtime does not have.

    Raises:
        InvalidArgument: Names what there is, and the package that brings a GPU.
    """
    there = runtime().get_available_providers()
    if provider not in there:
        way_out = "; pip install onnxruntime-gpu in the place of onnxruntime" if "CUDA" in provider else ""
        raise InvalidArgument(f"provider {provider!r} is not there: onnxruntime has {', '.join(there)}{way_out}")


class OrtSession:
    """One model, open.

    Args:
        path: The .onnx file.
        provider: The execution provider that must run it; nodes that it does not know go to the CPU's.
        threads: Threads within an operator; by default torch's.

    Attributes:
        session: onnxruntime's.
        inputs: What it takes, by name.
        outputs: Names of what it gives.
        device: Where its inputs are wanted, "cpu" or "cuda".

    Raises:
        InvalidArgument: The provider is not there, or the runtime fell back to another.
        InvalidFile: The file is missing or the runtime does not take it.
    """

    def __init__(self, path: Path, provider: str = "CPUExecutionProvider", threads: int | None = None) -> None:
        ort = runtime()
        check_provider(provider)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        # Else the runtime turns DequantizeLinear and MatMul into a product that rounds activations to 8 bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        options.log_severity_level = 3  # errors: what is a warning here is answered by the check below
        if not path.is_file():
            raise InvalidFile(f"{path}: there is no such file")
        try:
            self.session: onnxruntime.InferenceSession = ort.InferenceSession(path, options, providers=[provider])
        except Exception as error:  # the runtime's errors have no common class but Exception
            raise InvalidFile(f"{path}: {str(error).strip().splitlines()[0]}") from error
        running = self.session.get_providers()
        if running[0] != provider:
            raise InvalidArgument(
                f"asked for provider {provider!r}, onnxruntime runs on {running[0]!r}: its libraries are not all there"
            )
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        self.outputs = [item.name for item in self.session.get_outputs()]
        self.device = "cuda" if provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider") else "cpu"

    def check(self, name: str, value: Any) -> Tensor:
        """An input as the model takes it.

        Raises:
            InvalidType: It is no tensor, or of another dtype or shape.
        """
        item = self.inputs[name]
        dtype = DTYPES[item.type]
        wanted = f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, item.shape))}]"
        if not isinstance(value, Tensor):
            raise InvalidType(f"{name} must be a tensor {wanted}, got {type(value).__name__}")
        fixed = list(item.shape)
        fits = value.dtype == dtype and value.dim() == len(fixed)
        if not fits or any(isinstance(a, int) and a != b for a, b in zip(fixed, value.shape, strict=True)):
            got = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            raise InvalidType(f"{name} must be {wanted}, got {got}")
        return value.detach().to(self.device).contiguous()

    def run(self, inputs: Mapping[str, Tensor], state: State | None = None) -> list[Tensor]:
        """Run the model.

        Args:
            inputs: The user's inputs by name.
            state: State that the model reads and writes.

        Returns:
            The user's outputs, in order, on the CPU.

        Raises:
            InvalidType: An input that does not fit.
        """
        binding = self.session.io_binding()
        held = {name: self.check(name, value) for name, value in inputs.items()}
        for name, value in held.items():
            binding.bind_input(name, *_place(value))
        state_names = list(state.now) if state is not None else []
        results = [name for name in self.outputs if name.removeprefix("present.") not in state_names]
        for name in results:
            binding.bind_output(name)
        if state is not None:
            for name in state_names:
                binding.bind_input(f"past.{name}", *_place(state.now[name]))
                binding.bind_output(f"present.{name}", *_place(state.next[name]))
        self.session.run_with_iobinding(binding)
        if state is not None:
            state.turn()
        # In the order in which they were bound, so that state comes last.
        return [torch.from_numpy(value.numpy()) for value in binding.get_outputs()[: len(results)]]


class State:
    """What a program keeps between calls, as tensors that are bound where they lie.

    Args:
        initial: The state's first value, by name.
        in_place: Names of what the model writes into its input.
        device: "cpu" or "cuda".
    """

    def __init__(self, initial: Mapping[str, Tensor], in_place: Sequence[str], device: str = "cpu") -> None:
        self._initial = dict(initial)
        self.now = {
            name: value.to(device).clone(memory_format=torch.contiguous_format) for name, value in initial.items()
        }
        self.next = {name: value if name in in_place else torch.empty_like(value) for name, value in self.now.items()}

    def turn(self) -> None:
        """Make what was written the state."""
        self.now, self.next = self.next, self.now

    def reset(self) -> None:
        """Set everything back to the first value."""
        for name, value in self._initial.items():
            self.now[name].copy_(value)


def _place(value: Tensor) -> tuple[str, int, int, list[int], int]:
    """What a binding wants to know of a tensor: device, its number, element type, shape and address."""
    return value.device.type, value.device.index or 0, _ONNX[value.dtype], list(value.shape), value.data_ptr()
