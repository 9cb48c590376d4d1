"""Eight real photographs: a base stage of 64 px learns them from their captions, and a super-resolution stage to 256 px
learns crops of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from data_pipeline.content.images import training_pair
from tests.data_pipeline.photos import samples
from training.config.diffusion import DiffusionConfig, SamplerConfig
from training.config.experiment import TextConfig
from training.config.unet import UNetConfig
from training.diffusion.denoiser import to_unit, upsample
from training.diffusion.objective import loss
from training.diffusion.sampler import sample_stage
from training.model.unet import UNet
from training.text.encoder import build_text_encoder

PHOTOS = [*samples(0).values(), *samples(1).values()][:8]


@pytest.fixture(scope="module")
def text() -> tuple[Tensor, Tensor]:
    return build_text_encoder(TextConfig(max_tokens=16, dim=64)).encode([photo["txt"].decode() for photo in PHOTOS])


def learn(
    unet: UNet, pictures: Tensor, text: tuple[Tensor, Tensor], config: DiffusionConfig, steps: int, lr: float, **more
) -> None:
    """All eight in every step; the rate warms up and falls to zero over the second half."""
    optimizer = torch.optim.AdamW(unet.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 10, 2 * (1 - step / steps))
        positions = torch.arange(8) + 8 * step
        mean, _ = loss(unet, pictures, *text, config=config, seed=0, positions=positions, global_batch=8, **more)
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
    unet.eval()


def tensors(pairs: list, index: int) -> Tensor:
    return torch.stack([torch.tensor(pair[index]).permute(2, 0, 1) for pair in pairs])


def test_a_base_stage_learns_eight_photographs(text: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pictures = tensors([training_pair(photo["jpg"], size=64) for photo in PHOTOS], 0)
    structure = UNetConfig(
        widths=(64, 128), blocks=(1, 1), self_attention=(False, True), patch=16, cond_dim=128, head_dim=32, text_dim=64
    )
    unet = UNet(structure)
    config = DiffusionConfig(parametrization="x0", max_weight=2.0, text_drop=0.0)
    learn(unet, pictures, text, config, steps=120, lr=3e-3)
    sampler = SamplerConfig(steps=8, guidance=1.0)
    drawn = sample_stage(unet, *text, config=config, sampler=sampler, image_size=64, seeds=range(8))
    truth = to_unit(pictures).flatten(1)
    distance = torch.cdist(drawn.flatten(1), truth) / truth.shape[1] ** 0.5
    between = torch.cdist(truth, truth).sum() / 56 / truth.shape[1] ** 0.5
    assert distance.argmin(dim=1).tolist() == list(range(8)), "each caption draws its own photograph"
    assert distance.diagonal().mean() < 0.5 * between


def test_a_super_resolution_stage_learns_their_crops(text: tuple[Tensor, Tensor]) -> None:
    """16 -> 64 px windows of the 64 -> 256 px pair, against bicubic enlargement."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pairs = [training_pair(photo["jpg"], size=256, low_res_size=64, crop_size=64) for photo in PHOTOS]
    high, low = tensors(pairs, 0), tensors(pairs, 1)
    structure = UNetConfig(
        widths=(24, 48), blocks=(1, 1), self_attention=(False, False), patch=4, cond_dim=64, text_dim=64, low_res=True
    )
    unet = UNet(structure)
    config = DiffusionConfig(parametrization="x0", max_weight=2.0, text_drop=0.0, residual=True, aug_max=0.02)
    learn(unet, high, text, config, steps=90, lr=2e-3, low_res=low, image_size=256)
    sampler = SamplerConfig(steps=4, guidance=1.0, aug_level=0.0, threshold="static")
    drawn = sample_stage(unet, *text, config=config, sampler=sampler, image_size=64, seeds=range(8), low_res=low)

    def psnr(pictures: Tensor) -> float:
        error = (pictures.clamp(-1, 1) - to_unit(high)).square().flatten(1).mean(1)
        return (10 * torch.log10(4 / error)).mean().item()

    assert psnr(drawn) > psnr(upsample(to_unit(low), 64)) + 2.0
