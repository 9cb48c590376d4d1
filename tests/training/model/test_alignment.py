"""Losses on features against the papers' formulas, and the frozen encoder from a directory."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from data_pipeline.common.errors import ConfigError, DataError
from tests.training.evaluation.extractors.tiny_weights import dinov2_folder
from training.config.features import DinoConfig, PerceptualConfig, RepaConfig
from training.config.unet import PRESETS
from training.model.alignment import Alignment, alignment_loss, repa_term, token_distance
from training.model.dinov2 import Dinov2, patch_grid, pinned_dino, prepared
from training.model.perceptual import perceptual_term
from training.model.unet import UNet


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a dino")
    dinov2_folder(folder)
    return folder


def test_the_distance_is_that_of_the_paper() -> None:
    """REPA, equation 8, for each sample: minus the mean cosine, here plus one."""
    torch.manual_seed(0)
    found, wanted = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    for row, value in enumerate(token_distance(found, wanted).tolist()):
        pairs = zip(found[row], wanted[row], strict=True)
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
        assert value == pytest.approx(1 - sum(cosines) / 5, abs=1e-6)
    assert token_distance(3 * wanted, wanted).abs().max() < 1e-6
    assert token_distance(-wanted, wanted) == pytest.approx(torch.full((3,), 2.0))


def test_a_map_is_compared_on_the_grid_of_the_encoder() -> None:
    """U-REPA: the U-Net's coarse map is up-sampled after the small network. A constant map stays constant."""
    made = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    wanted = torch.tensor([2.0, 4.0]).expand(1, 12, 2)
    assert float(alignment_loss(made, wanted, (3, 4))) == pytest.approx(0, abs=1e-6)
    torch.manual_seed(0)
    made, wanted = torch.randn(2, 3, 2, 2), torch.randn(2, 16, 3)
    sized = F.interpolate(made, size=(4, 4), mode="bilinear")
    plain = 1 - torch.stack(
        [F.cosine_similarity(sized[:, :, y, x], wanted[:, 4 * y + x]) for y in range(4) for x in range(4)]
    )
    torch.testing.assert_close(alignment_loss(made, wanted, (4, 4)), plain.mean(0))


def test_after_its_end_it_is_an_exact_zero_with_a_gradient_for_every_weight() -> None:
    unet = UNet(PRESETS["tiny_base"])
    unet.alignment = Alignment(unet.config.widths[-1], 8, 32)
    inputs = torch.randn(2, 3, 16, 16), torch.zeros(2), torch.randn(2, 4, 32), torch.ones(2, 4, dtype=torch.bool)
    repa = RepaConfig(weight=0.5, until=10)
    out = unet(*inputs)
    made = unet.alignment.take()
    assert made.shape == (2, 32, 4, 4), "the coarsest level"
    term = repa_term(made, None, (1, 1), repa)
    (out.square().mean() + term.sum()).backward()
    assert term.tolist() == [0.0, 0.0]
    assert all(p.grad is not None and not p.grad.any() for p in unet.alignment.parameters())
    unet(*inputs)
    repa_term(unet.alignment.take(), torch.randn(2, 9, 32), (3, 3), repa).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in unet.alignment.parameters())
    assert unet.stem.weight.grad is not None and unet.stem.weight.grad.any(), "it reaches the U-Net"


def test_features_are_the_encoders_patches(dino: Path) -> None:
    from transformers import Dinov2Model

    encoder = Dinov2(DinoConfig(path=str(dino), side=28), torch.float32, "cpu")
    pictures = torch.rand(2, 3, 28, 28) * 2 - 1
    found, grid = encoder(pictures)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = ((pictures + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    whole = Dinov2Model.from_pretrained(dino)(pixel_values=normalised).last_hidden_state
    assert grid == (2, 2) and found.shape == (2, 4, 32)
    torch.testing.assert_close(found, whole[:, 1:], rtol=1e-4, atol=1e-5)
    assert not found.requires_grad and prepared(pictures, 14, 42).shape == (2, 3, 14, 42)


def test_a_picture_of_another_shape_keeps_its_shape() -> None:
    assert patch_grid(64, 64, 224, 14) == (16, 16)
    assert patch_grid(48, 80, 224, 14) == (12, 21), "about as many patches, in the picture's shape"
    assert patch_grid(8, 512, 28, 14) == (1, 16)


def test_another_encoder_or_a_damaged_one_is_refused(dino: Path, tmp_path: Path) -> None:
    config = pinned_dino(DinoConfig(path=str(dino)))
    assert pinned_dino(config) == config and pinned_dino(DinoConfig()) == DinoConfig()
    with pytest.raises(DataError, match=r"dino\.path=.*/none: there is no model; .*hf download facebook/dinov2-base"):
        pinned_dino(DinoConfig(path=str(tmp_path / "none")))
    with pytest.raises(DataError, match=r"dino\.path=.*: it has no weights \(model\.safetensors\)"):
        pinned_dino(DinoConfig(path=str(tmp_path)))
    other = tmp_path / "other"
    shutil.copytree(dino, other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    del weights[name]
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"dino\.sha=.*dino\.path=.* has a different encoder"):
        pinned_dino(DinoConfig(path=str(other), sha=config.sha))
    with pytest.raises(DataError, match=r"dino\.path=.*its weights lack 1 tensors; fetch"):
        Dinov2(DinoConfig(path=str(other)), torch.float32, "cpu")
    (other / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(DataError, match=r"a model of type clip, not dinov2"):
        Dinov2(DinoConfig(path=str(other)), torch.float32, "cpu")


def test_the_perceptual_loss_is_the_papers_and_ends_at_high_noise(dino: Path) -> None:
    """PixelGen: the mean over patches of 1 - cosine, none in the noisiest 30 % of its times."""
    torch.manual_seed(0)
    seen, wanted = torch.randn(4, 5, 7), torch.randn(4, 5, 7)
    config = PerceptualConfig(weight=0.01)
    assert config.log_snr_above == pytest.approx(2 * math.log(0.3 / 0.7), abs=0.01)
    term = perceptual_term(seen, wanted, torch.tensor([-20.0, -1.7, -1.68, 20.0]), config)
    plain = 1 - F.cosine_similarity(seen, wanted, dim=-1).mean(1)
    torch.testing.assert_close(term, 0.01 * plain * torch.tensor([0.0, 0.0, 1.0, 1.0]))

    encoder = Dinov2(DinoConfig(path=str(dino), side=28), torch.float32, "cpu")
    clean = torch.rand(2, 3, 16, 16) * 2 - 1
    estimate = (clean + 0.3 * torch.randn_like(clean)).requires_grad_()
    term = perceptual_term(encoder(estimate, learn=True)[0], encoder(clean)[0], torch.tensor([0.0, -9.0]), config)
    term.sum().backward()
    assert estimate.grad is not None and estimate.grad[0].any() and not estimate.grad[1].any()
    assert all(weight.grad is None for weight in encoder.model.parameters()), "it stays frozen"
