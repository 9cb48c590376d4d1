"""The header of a safetensors file (https://github.com/huggingface/safetensors#format), for files written as a stream.

The library's own writer needs whole tensors in memory, and a second pass over the bytes for a checksum.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence


def header(tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the length-prefixed JSON header, padded to 8 bytes; the tensors' bytes follow it in the same order.

    Args:
        tensors: name -> (dtype as spelled by the format, shape, size in bytes).
        metadata: entries of `__metadata__`.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
