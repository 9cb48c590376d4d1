from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data_pipeline.photos import samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of pictures with their captions, one picture in a subfolder, one without a caption."""
    root = tmp_path / "pictures"
    (root / "deep").mkdir(parents=True)
    for number, (key, sample) in enumerate(samples().items()):
        place = root / "deep" / key if number == 2 else root / key
        place.with_suffix(".jpg").write_bytes(sample["jpg"])
        if number == 3:
            place.with_suffix(".json").write_text(json.dumps({"caption": "from the json", "AESTHETIC_SCORE": 6.5}))
        elif number != 4:
            place.with_suffix(".txt").write_bytes(sample["txt"])
    return root
