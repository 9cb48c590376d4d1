"""The header of a safetensors file (https://github.com/huggingface/safetensors#format), for files that are written as a
stream: the library's own writer takes whole tensors and a second look at the bytes for a checksum."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence


def header(tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str] | None = None) -> bytes:
    """The length-prefixed JSON header, padded to 8 bytes; the tensors' bytes follow it in the same order.

    Args:
        tensors: name -> (dtype as the format spells it, shape, bytes).
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
