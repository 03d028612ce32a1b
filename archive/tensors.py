"""The tensors of an archive: a table of what each one is, and one safetensors member with the bytes.

A tensor is stored once however many names, phases and views it has, and comes back as one object or as views of one.
State that is one value throughout (an empty cache) is stored as that value. Bytes are written tensor by tensor and read
by mapping the file, so neither way holds a second copy of the weights in memory.

The safetensors layout: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the data).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import InvalidFile
from ..torch_private import FakeTensor
from .symbols import read_device, read_dtype

ALIGNMENT = 64  # bytes: a cache line and the widest vector registers; what torch's own allocator gives


class TensorWriter:
    """Gathers the tensors of an archive, then writes them."""

    def __init__(self) -> None:
        self._keys: dict[tuple[Any, ...], str] = {}
        self._tensors: dict[str, Tensor] = {}
        self._state: set[str] = set()
        self._stored: list[str] = []
        self._header = b""

    def add(self, name: str, tensor: object, *, state: bool = False) -> str:
        """The key under which the tensor is stored: its name, unless another tensor has that name already."""
        if not isinstance(tensor, Tensor):
            raise InvalidFile(f"{name}: a {type(tensor).__name__} cannot be stored, only tensors can")
        _check_storable(name, tensor)
        identity = _identity(tensor)
        if identity not in self._keys:
            copies = (f"{name}@{number}" for number in range(1, len(self._tensors) + 2))
            key = name if name not in self._tensors else next(copy for copy in copies if copy not in self._tensors)
            self._keys[identity] = key
            self._tensors[key] = tensor
        key = self._keys[identity]
        if state:
            self._state.add(key)
        return key

    def table(self) -> dict[str, dict[str, Any]]:
        """What each key is, once all are added: dtype, shape, device, and one of ``view``, ``fill`` and ``stored``."""
        views = self._views()
        state = self._state | {base for key, (base, _) in views.items() if key in self._state}
        table: dict[str, dict[str, Any]] = {}
        self._stored = []
        for key, tensor in self._tensors.items():
            entry = table[key] = _facts(tensor)
            if key in views:
                base, offset = views[key]
                entry["view"] = [base, offset, list(tensor.stride())]
            elif key in state and _is_spread(tensor):
                entry["fill"], entry["spread"] = _fill(tensor[(0,) * tensor.dim()].reshape(1)), True
            elif key in state and tensor.is_contiguous() and (fill := _fill(tensor)) is not None:
                entry["fill"] = fill
            else:
                entry["stored"] = None if tensor.is_contiguous() or not _is_dense(tensor) else list(tensor.stride())
                self._stored.append(key)
        # Sizes that keep the alignment come first, then ever smaller elements: every tensor is aligned to its element.
        self._stored.sort(key=lambda key: (_bytes(self._tensors[key]) % ALIGNMENT != 0, -self._tensors[key].itemsize))
        self._header = self._safetensors_header()
        return table

    @property
    def size(self) -> int:
        """Bytes of the safetensors member; after ``table``."""
        return len(self._header) + sum(_bytes(self._tensors[key]) for key in self._stored)

    def write(self, stream: IO[bytes]) -> None:
        """Write the safetensors member; one tensor at a time is made contiguous."""
        stream.write(self._header)
        for key in self._stored:
            raw = memoryview(_raw(self._tensors[key]).numpy())
            for start in range(0, len(raw), _CHUNK):
                stream.write(raw[start : start + _CHUNK])

    def _views(self) -> dict[str, tuple[str, int]]:
        """The tensors that lie inside another one of the same storage and dtype: its key, and the offset in it."""
        groups: defaultdict[tuple[int, torch.dtype, torch.device], list[str]] = defaultdict(list)
        for key, tensor in self._tensors.items():
            if tensor.numel():
                groups[tensor.untyped_storage().data_ptr(), tensor.dtype, tensor.device].append(key)
        views: dict[str, tuple[str, int]] = {}
        for keys in groups.values():
            bases: list[str] = []
            for key in sorted(keys, key=lambda key: (-_span(self._tensors[key]), not _is_dense(self._tensors[key]))):
                first, last = _reach(self._tensors[key])
                for base in bases:
                    low, high = _reach(self._tensors[base])
                    if _is_dense(self._tensors[base]) and low <= first and last <= high:
                        views[key] = (base, first - low)
                        break
                    if first <= high and low <= last and not self._state.isdisjoint((key, base)):
                        raise InvalidFile(f"the state {key} overlaps {base}, and neither lies inside the other")
                else:
                    bases.append(key)
        return views

    def _safetensors_header(self) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for key in self._stored:
            tensor = self._tensors[key]
            dtype, shape = _stored_form(tensor.dtype, list(tensor.shape))
            entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + _bytes(tensor)]}
            position += _bytes(tensor)
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        return struct.pack("<Q", len(text)) + text


def read_tensors(file: mmap.mmap, start: int, size: int, table: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The tensors of a table, over the mapped bytes; parameters come back as parameters.

    The mapping lives as long as a tensor that uses it. Writing to a tensor changes memory, never the file.

    Raises:
        InvalidFile: The safetensors header, the table and the size of the member do not agree.
    """
    offsets = _read_header(file, start, size, table)
    _check_memory(table)
    raw: dict[str, Tensor] = {}
    for key, entry in table.items():
        if "view" not in entry:
            raw[key] = _read_whole(file, offsets.get(key), entry).to(_present_device(key, entry["device"]))
    for key, entry in table.items():
        if "view" in entry:
            raw[key] = _read_view(key, raw, table)
    return {key: _dress(tensor, table[key]) for key, tensor in raw.items()}


def _read_header(file: mmap.mmap, start: int, size: int, table: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    length = struct.unpack("<Q", file[start : start + 8])[0] if size >= 8 else -1
    if not 2 <= length <= min(size - 8, _MAX_HEADER):
        raise InvalidFile(f"the safetensors header claims {length} bytes of {size}")
    entries = json.loads(file[start + 8 : start + 8 + length])
    entries.pop("__metadata__", None)
    if entries.keys() != {key for key, entry in table.items() if "stored" in entry}:
        raise InvalidFile("the names in the safetensors header are not those of the manifest")
    offsets: dict[str, int] = {}
    position = 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _stored_form(read_dtype(table[key]["dtype"]), _read_shape(table[key]["shape"]))
        if entry["dtype"] != dtype or entry["shape"] != shape:
            raise InvalidFile(f"{key} is {entry['dtype']} {entry['shape']} in the safetensors header")
        offsets[key] = start + 8 + length + position
        end = position + _table_bytes(table[key])
        if entry["data_offsets"] != [position, end]:
            raise InvalidFile(f"{key} claims the bytes {entry['data_offsets']}, expected {[position, end]}")
        position = end
    if 8 + length + position != size:
        raise InvalidFile(f"the tensors take {8 + length + position} bytes, the member has {size}")
    return offsets


def _check_memory(table: Mapping[str, Mapping[str, Any]]) -> None:
    # What is stored is bounded by the file; a fill is a few bytes that can ask for any amount of memory.
    filled = sum(_table_bytes(entry) for entry in table.values() if "fill" in entry and "spread" not in entry)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if filled > memory:
        raise InvalidFile(f"the state takes {filled} bytes, this machine has {memory}")


def _read_whole(file: mmap.mmap, offset: int | None, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = read_dtype(entry["dtype"]), _read_shape(entry["shape"])
    if "fill" in entry:
        element = bytes.fromhex(entry["fill"])
        if len(element) != dtype.itemsize:
            raise InvalidFile(f"{entry['fill']!r} is not one element of {dtype}")
        if "spread" in entry:
            return torch.frombuffer(bytearray(element), dtype=dtype)[0].expand(shape)
        if not any(element):
            return torch.zeros(shape, dtype=dtype)
        return torch.frombuffer(bytearray(element), dtype=dtype)[0].expand(shape).clone(memory_format=_CONTIGUOUS)
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    assert offset is not None  # _read_header has one for every stored tensor
    tensor = torch.frombuffer(file, dtype=dtype, count=count, offset=offset).view(shape)
    strides = entry["stored"]
    if strides is not None:
        if not _dense(shape, [_size(stride) for stride in strides]):
            raise InvalidFile(f"the strides {strides} do not lay out the shape {shape} without gaps")
        return torch.empty_strided(shape, strides, dtype=dtype).copy_(tensor)
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _read_view(key: str, raw: Mapping[str, Tensor], table: Mapping[str, Mapping[str, Any]]) -> Tensor:
    name, offset, strides = table[key]["view"]
    if name not in table or "view" in table[name]:
        raise InvalidFile(f"{key} is a view of {name!r}, which is no stored tensor")
    base = raw[name]
    shape, strides = _read_shape(table[key]["shape"]), [_size(stride) for stride in strides]
    reach = _size(offset) + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    if base.dtype != read_dtype(table[key]["dtype"]) or reach >= base.numel() or 0 in shape:
        raise InvalidFile(f"{key} does not lie inside {name}")
    return base.as_strided(shape, strides, base.storage_offset() + offset)


def _dress(tensor: Tensor, entry: Mapping[str, Any]) -> Tensor:
    requires_grad = entry.get("requires_grad") is True
    if entry.get("parameter") is True:
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)
    return tensor.requires_grad_(requires_grad) if requires_grad else tensor


def _present_device(key: str, name: str) -> torch.device:
    device = read_device(name)
    if device.type == "meta":
        raise InvalidFile(f"{key}: a tensor without data")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidFile(f"{key} is on {name}, which this machine does not have; save the program on cpu") from error
    return device


def _check_storable(name: str, tensor: Tensor) -> None:
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        raise InvalidFile(f"{name}: a tensor without data cannot be stored")
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        raise InvalidFile(f"{name}: a {type(tensor).__name__} of layout {tensor.layout} cannot be stored")
    if tensor.dtype not in _SAFETENSORS and not tensor.dtype.is_complex:
        raise InvalidFile(f"{name}: {tensor.dtype} cannot be stored")


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset()) if tensor.numel() else (id(tensor),)
    form = (tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride())
    return (*place, *form, isinstance(tensor, torch.nn.Parameter), tensor.requires_grad)


def _facts(tensor: Tensor) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "device": str(tensor.device),
    }
    if isinstance(tensor, torch.nn.Parameter):
        facts["parameter"] = True
    if tensor.requires_grad:
        facts["requires_grad"] = True
    return facts


def _fill(tensor: Tensor) -> str | None:
    """The bytes of the element that fills the tensor, as hexadecimal digits; none where elements differ."""
    if not tensor.numel():
        return None
    elements = _raw(tensor).view(-1, tensor.itemsize)
    first = elements[0]
    # Most tensors that differ do so at once, and are not read to their end.
    same = bool((elements[:1024] == first).all()) and bool((elements == first).all())
    return bytes(first.tolist()).hex() if same else None


def _raw(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _reach(tensor: Tensor) -> tuple[int, int]:
    """The first and the last element in the storage."""
    first = int(tensor.storage_offset())
    return first, first + _span(tensor) - 1


def _span(tensor: Tensor) -> int:
    return 1 + sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _is_spread(tensor: Tensor) -> bool:
    """Whether the tensor is one element of memory, seen everywhere: it stands for what is made when a program runs."""
    return tensor.numel() > 1 and not any(tensor.stride())


def _is_dense(tensor: Tensor) -> bool:
    return _dense(tensor.shape, tensor.stride())


def _dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor of this layout is some permutation of a contiguous one."""
    expected = 1
    for stride, count in sorted(zip(strides, shape, strict=True)):
        if count != 1:
            if stride != expected:
                return False
            expected *= count
    return True


def _stored_form(dtype: torch.dtype, shape: list[int]) -> tuple[str, list[int]]:
    """How safetensors names the dtype; a complex tensor is stored as pairs of real numbers."""
    if dtype.is_complex:
        return _SAFETENSORS[dtype.to_real()], [*shape, 2]
    if dtype not in _SAFETENSORS:
        raise InvalidFile(f"{dtype} cannot be stored")
    return _SAFETENSORS[dtype], shape


def _table_bytes(entry: Mapping[str, Any]) -> int:
    return math.prod(_read_shape(entry["shape"])) * read_dtype(entry["dtype"]).itemsize


def _read_shape(data: list[Any]) -> list[int]:
    shape = [_size(count) for count in data]
    if len(shape) > _MAX_DIMENSIONS or math.prod(shape) > _MAX_ELEMENTS:
        raise InvalidFile(f"no tensor has the shape {shape}")
    return shape


def _size(data: object) -> int:
    if isinstance(data, bool) or not isinstance(data, int) or not 0 <= data <= _MAX_ELEMENTS:
        raise InvalidFile(f"{data!r} is not a size")
    return data


_CHUNK = 16 << 20
_CONTIGUOUS = torch.contiguous_format
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_MAX_DIMENSIONS = 64  # of a torch tensor
_MAX_ELEMENTS = 2**48
_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
