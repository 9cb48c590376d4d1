"""Streams tensors into safetensors files, computing both checksums on the way, and opens such files."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash

from data_pipeline.storage.safetensors import header

CHUNK = 1 << 24
NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def chunks(tensors: dict[str, torch.Tensor]) -> Iterator[memoryview | bytes]:
    """Yield the bytes of a safetensors file, without copying the tensors, which must be on the CPU."""
    yield header({name: (NAMES[t.dtype], t.shape, t.nbytes) for name, t in tensors.items()})
    for tensor in tensors.values():
        flat = tensor.detach().contiguous().view(-1)
        if flat.numel():
            view = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
            yield from (view[i : i + CHUNK] for i in range(0, len(view), CHUNK))


class Digest:
    """Passes chunks through and computes their size and two checksums: SHA-256, which identifies the content, and XXH3,
    15 times as fast, which every start can afford to verify."""

    def __init__(self, source: Iterable[memoryview | bytes]) -> None:
        self._source, self._hash, self._fast, self.size = source, hashlib.sha256(), xxhash.xxh3_128(), 0

    def __iter__(self) -> Iterator[memoryview | bytes]:
        for chunk in self._source:
            self._hash.update(chunk)
            self._fast.update(chunk)
            self.size += len(chunk)
            yield chunk

    @property
    def xxh3(self) -> str:
        """XXH3 (128 bits) of the chunks passed so far, as hex."""
        return self._fast.hexdigest()

    @property
    def sha256(self) -> str:
        """SHA-256 of the chunks passed so far, as hex."""
        return self._hash.hexdigest()


def open_tensors(path: Path) -> Any:
    """Map a safetensors file; the tensors are read from it on demand.

    Raises:
        OSError: it cannot be opened; the library calls it missing, whatever the reason.
        SafetensorError: it is damaged.
    """
    from safetensors import safe_open

    with open(path, "rb"):
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError as error:  # it was there just now
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path)) from error


def split_by_size(tensors: dict[str, torch.Tensor], limit: int) -> list[dict[str, torch.Tensor]]:
    """Split tensors into consecutive groups of at most `limit` bytes; a larger tensor gets its own group."""
    groups: list[dict[str, torch.Tensor]] = []
    size = limit + 1
    for name, tensor in tensors.items():
        if size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups
