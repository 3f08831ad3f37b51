"""A safetensors file that is written a part at a time, for tensors larger than memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["TensorFile"]

# Widest first, so that every tensor begins at a multiple of its own item size.
CODES = {torch.int64: "I64", torch.float32: "F32", torch.bool: "BOOL"}


class TensorFile:
    """Tensors of known dtypes (int64, float32, bool) and shapes in one new safetensors file.

    Rows along the first axis are written in any order; what is never written is 0. Within `with`;
    afterwards the file is read like any other safetensors file.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]
    ) -> None:
        order = list(CODES)
        header: dict[str, Any] = {}
        self.places: dict[str, tuple[int, int]] = {}  # first byte and bytes of a row
        end = 0
        for name in sorted(tensors, key=lambda name: order.index(tensors[name][0])):
            dtype, shape = tensors[name]
            begin, row = end, math.prod(shape[1:]) * dtype.itemsize
            end = begin + shape[0] * row
            header[name] = {
                "dtype": CODES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
            self.places[name] = begin, row
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.data = 8 + len(text)  # where the numbers begin
        self.file = path.open("wb")
        self.file.write(len(text).to_bytes(8, "little") + text)
        self.file.truncate(self.data + end)

    def put(self, name: str, row: int, values: Tensor) -> None:
        """Writes one row or, as values [rows, ...] of several axes, those from `row` on."""
        begin, size = self.places[name]
        self.file.seek(self.data + begin + row * size)
        self.file.write(values.detach().contiguous().cpu().numpy().tobytes())

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def bytes_of(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> int:
    """The size of such tensors."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
