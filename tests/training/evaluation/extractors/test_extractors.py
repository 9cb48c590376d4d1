"""Extractors from local files of random weights, on real photographs, with every connection refused."""

from __future__ import annotations

import importlib.util
import socket
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.common.errors import ConfigError, DataError
from tests.training.evaluation.extractors import tiny_weights
from training.evaluation.extractors.base import in_batches, open_extractors
from training.evaluation.extractors.inception import Inception, resize_like_tensorflow
from training.evaluation.extractors.towers import resized
from training.evaluation.metrics.frechet import frechet_figure

PICTURES = np.random.default_rng(0).integers(0, 256, (6, 48, 48, 3)).astype(np.uint8)


@pytest.fixture(autouse=True)
def no_network(monkeypatch) -> None:
    def refuse(*arguments):
        raise AssertionError(f"a connection was tried: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def inception(folder: Path):
    return tiny_weights.inception_file(folder)


def torch_fidelity_class():
    """Its Inception, imported without the package's other extractors, which need torchvision."""
    found = importlib.util.find_spec("torch_fidelity")
    if found is None:
        pytest.skip("torch-fidelity is not installed: pip install --no-deps -r requirements-test.lock")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["torch_fidelity"] = package
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3


def test_inception_equals_torch_fidelitys_on_the_same_file(inception) -> None:
    theirs = torch_fidelity_class()("theirs", ["2048"], feature_extractor_weights_path=inception.path)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(PICTURES).permute(0, 3, 1, 2))[0].numpy()
    mine = open_extractors({"inception": inception})[-1]
    features = mine.pictures(PICTURES)
    assert features.shape == (6, 2048) and features.std() > 0.01
    assert np.abs(features - expected).max() <= 1e-6 * np.abs(expected).max()
    two = [frechet_figure(f[:3, :64], f[3:, :64]).value for f in (features, expected)]
    assert two[0] == pytest.approx(two[1], rel=1e-6)
    assert mine.describe() == {"width": 2048, "sha256": inception.sha256, "rule": mine.rule} and "299" in mine.rule


def test_networks_run_with_cudnn_and_without_tf32() -> None:
    seen = []

    def compute(batch: torch.Tensor) -> torch.Tensor:
        seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
        return batch.float().mean(dim=(2, 3))

    assert in_batches(PICTURES, 4, "cpu", compute).shape == (6, 3) and seen == [(True, False)] * 2


def test_the_resize_is_tensorflows_not_torchs() -> None:
    x = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert resize_like_tensorflow(x, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]


def test_clip_and_dinov2_are_transformers_own_towers(tmp_path: Path) -> None:
    from transformers import CLIPModel, Dinov2Model

    (tmp_path / "clip").mkdir()
    (tmp_path / "dino").mkdir()
    configs = {
        "clip": tiny_weights.clip_folder(tmp_path / "clip"),
        "dino": tiny_weights.dinov2_folder(tmp_path / "dino"),
    }
    clip, dino = open_extractors(configs)[-2:]
    assert clip.width == 24 and dino.width == 32 and "32 px" in clip.rule and "28 px" in dino.rule
    model = CLIPModel.from_pretrained(tmp_path / "clip")
    batch = torch.from_numpy(resized(PICTURES, 32)).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    with torch.no_grad():
        seen = model.vision_model((batch - mean.view(3, 1, 1)) / std.view(3, 1, 1)).pooler_output
        expected = model.visual_projection(seen).numpy()
        whole = Dinov2Model.from_pretrained(tmp_path / "dino")
    assert clip.pictures(PICTURES) == pytest.approx(expected, abs=1e-5)
    assert dino.pictures(PICTURES).shape == (6, whole.config.hidden_size)
    assert clip.texts is not None and dino.texts is None
    words = clip.texts(["a cat", "a" * 500, ""])  # too long for the tower: cut, not refused
    assert words.shape == (3, 24) and np.abs(words[0] - words[2]).max() > 1e-3


def test_missing_wrong_or_unstated_weights_are_named(tmp_path: Path, inception) -> None:
    absent = replace(inception, path=str(tmp_path / "no.pth"))
    with pytest.raises(
        DataError, match=r"extractors\.fid\.path=.*no\.pth \(SHA-256 \w{64}\); fetch it from https://example.org"
    ):
        open_extractors({"fid": absent})
    with pytest.raises(DataError, match=r"has the SHA-256 \w{64}, not 0000 "):
        open_extractors({"fid": replace(inception, sha256="0000")})
    with pytest.raises(ConfigError, match=rf"fid\.sha256: set it to that of the weights.*{inception.sha256}"):
        open_extractors({"fid": replace(inception, sha256="")})
    other = tmp_path / "other.pth"
    torch.save({"x": torch.zeros(1)}, other)
    with pytest.raises(DataError, match="not inception"):
        open_extractors({"fid": tiny_weights.stated("inception", other)})


def test_without_weights_two_feature_spaces_are_always_available() -> None:
    found = open_extractors({})
    assert [e.name for e in found] == ["colour_grid_4x4", "random_filters_64"]
    assert [e.pictures(PICTURES).shape[1] for e in found] == [e.width for e in found]
    assert sum(p.numel() for p in Inception().parameters()) == 21_785_568


def test_weights_that_are_not_finite_are_refused_before_pictures_are_drawn(inception, folder: Path) -> None:
    state = torch.load(inception.path)
    state["Conv2d_1a_3x3.conv.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, folder / "nan.pth")
    damaged = tiny_weights.stated("inception", folder / "nan.pth")
    with pytest.raises(
        DataError, match=r"extractors\.mine\.path=.*nan\.pth: its features of a grey picture are not finite"
    ):
        open_extractors({"mine": damaged})
