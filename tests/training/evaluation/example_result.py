"""A result.json written by hand."""

from __future__ import annotations

from typing import Any

from training.evaluation.report import FIELDS


def entry(value: float, n: int = 8) -> dict[str, Any]:
    return {"value": value, "interval": [value - 0.1, value + 0.1], "n": n, "detectable": 0.0456}


RESULT: dict[str, Any] = {
    "kind": "shapes",
    "samples": {field: entry(0.5) for field in FIELDS},
    "real": {field: entry(1.0) for field in FIELDS},
    "by_word": {"shape": {"circle": entry(0.25)}},
    "psnr": {"n": 3, "stages": {"sr": {"sr": entry(31.234), "sr_noised": entry(30.1), "bicubic": entry(29.876)}}},
    "frechet": {"colour_grid_4x4": entry(0.1234) | {"floor": 1.3e-6, "width": 48}},
    "kid": {"colour_grid_4x4": entry(-0.00012)},
    "n": {"samples": 8, "reference": 8, "prompts": 8, "broken": 0},
    "remarks": ["a remark"],
    "protocol": {
        "bundle": "b",
        "seed": 3,
        "extractors": {"colour_grid_4x4": {"width": 48, "sha256": "", "rule": "none"}},
        "stages": [{"name": "sr", "step": 9, "sha256": "a" * 64, "sampler": {"steps": 20}}],
    },
}
