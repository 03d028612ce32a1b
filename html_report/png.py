"""Small images as `data:` addresses, without an imaging library."""

from __future__ import annotations

import base64
import struct
import zlib

from torch import Tensor

from ..errors import InvalidArgument


def png_address(image: Tensor) -> str:
    """An image as PNG (ISO/IEC 15948) in a `data:` address.

    Args:
        image: uint8 [H, W] (grey) or [H, W, 3].

    Raises:
        InvalidArgument: It has another shape or dtype.
    """
    grey = image.dim() == 2
    if str(image.dtype) != "torch.uint8" or not (grey or (image.dim() == 3 and image.shape[2] == 3)):
        raise InvalidArgument(f"expected uint8 [H, W] or [H, W, 3], got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    rows = image.reshape(height, -1).cpu().numpy()
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if grey else 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows), 9)
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
