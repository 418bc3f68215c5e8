"""Vary images on the GPU while training the small CLIP.

In: uint8 pixels already on the device. Out: float images in 0..1, or normalised for the tower.
Drawn images change little (their captions name places and sizes); photographs change a lot.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from clip_model import MEAN, STD
from torch import Tensor


def to_float(pixels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in 0..1."""
    return pixels.permute(0, 3, 1, 2).float() / 255


@functools.cache
def statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the channels, kept on the device: a copy at every step would make the CPU wait."""
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return mean, std


def normalise(images: Tensor) -> Tensor:
    mean, std = statistics(images.device)
    return (images - mean) / std


def enlarge(images: Tensor, side: int) -> Tensor:
    """As the image processor enlarges a small image (Pillow's bicubic)."""
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def uniform(count: int, low: float, high: float, device: torch.device) -> Tensor:
    return torch.empty(count, device=device).uniform_(low, high)


def vary_photos(images: Tensor) -> Tensor:
    """Mirror, shift; half also turn, stretch and zoom; colours; a hole now and then."""
    count, device = len(images), images.device
    mirror = torch.where(torch.rand(count, device=device) < 0.5, -1.0, 1.0)
    gentle = torch.rand(count, device=device) < 0.5
    pixel = 2 / images.shape[-1]
    angle = torch.where(gentle, 0.0, uniform(count, -0.26, 0.26, device))
    zoom = torch.where(gentle, 1.0, uniform(count, 0.65, 1.1, device))
    stretch = torch.where(gentle, 1.0, uniform(count, 0.85, 1.18, device))
    shift = torch.where(
        gentle[:, None],
        torch.randint(-4, 5, (count, 2), device=device) * pixel,
        torch.empty(count, 2, device=device).uniform_(-0.22, 0.22),
    )
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = [cos * mirror * stretch, -sin, shift[:, 0], sin * mirror, cos / stretch, shift[:, 1]]
    theta = torch.stack(rows, 1).view(count, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    images = vary_colours(images, 0.4, 0.8)
    return punch(images)


def vary_colours(images: Tensor, strength: float, share: float) -> Tensor:
    """Brightness, contrast and saturation for `share` of the images; a few in grey."""
    count, device = len(images), images.device
    on = (torch.rand(count, 1, 1, 1, device=device) < share).float()
    bright, contrast, colour = (
        1 + on * (torch.rand(count, 1, 1, 1, device=device) * 2 - 1) * strength for _ in range(3)
    )
    images = images * bright
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * contrast + mean
    grey = images.mean(1, keepdim=True)
    colour = torch.where(torch.rand(count, 1, 1, 1, device=device) < 0.08 * on, 0.0, colour)
    return ((images - grey) * colour + grey).clamp(0, 1)


def punch(images: Tensor, share: float = 0.5, side: int = 10) -> Tensor:
    """A square of the mean colour over part of some images."""
    count, _, height, width = images.shape
    device = images.device
    top = torch.randint(-side // 2, height - side // 2, (count, 1, 1, 1), device=device)
    left = torch.randint(-side // 2, width - side // 2, (count, 1, 1, 1), device=device)
    y = torch.arange(height, device=device).view(1, 1, -1, 1)
    x = torch.arange(width, device=device).view(1, 1, 1, -1)
    hole = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)
    hole &= torch.rand(count, 1, 1, 1, device=device) < share
    return torch.where(hole, images.mean((2, 3), keepdim=True), images)


def mix(images: Tensor, labels: Tensor, share: float = 0.6) -> tuple[Tensor, Tensor]:
    """Blend (half of the time) or paste a box of another image, for `share` of the batch; labels (B, K) go along."""
    count, _, height, width = images.shape
    device = images.device
    other = torch.randperm(count, device=device)
    keep = torch.rand(count, device=device)
    keep = torch.where(torch.rand(count, device=device) < share, keep, 1.0)
    boxed = torch.rand(count, device=device) < 0.5
    half_h, half_w = ((1 - keep).sqrt() * size / 2 for size in (height, width))
    cy, cx = torch.rand(count, device=device) * height, torch.rand(count, device=device) * width
    y = torch.arange(height, device=device).view(1, -1, 1) + 0.5
    x = torch.arange(width, device=device).view(1, 1, -1) + 0.5
    box = ((y - cy.view(-1, 1, 1)).abs() < half_h.view(-1, 1, 1)) & (
        (x - cx.view(-1, 1, 1)).abs() < half_w.view(-1, 1, 1)
    )
    own = torch.where(boxed.view(-1, 1, 1), 1 - box.float(), keep.view(-1, 1, 1).expand(-1, height, width))
    ratio = own.mean((1, 2)).view(-1, 1)
    own = own.unsqueeze(1)
    return images * own + images[other] * (1 - own), labels * ratio + labels[other] * (1 - ratio)


def vary_drawn(pixels: Tensor) -> Tensor:
    """A few pixels' shift, a little zoom and light; a little noise and blur. Nothing that a caption could contradict."""
    images = to_float(pixels)
    count, device = len(images), images.device
    move = (torch.rand(count, device=device) < 0.5).float()
    pixel = 2 / images.shape[-1]
    zoom = 1 + move * uniform(count, -0.03, 0.03, device)
    angle = move * uniform(count, -math.radians(2), math.radians(2), device)
    shift = move[:, None] * torch.empty(count, 2, device=device).uniform_(-2 * pixel, 2 * pixel)
    rows = [angle.cos() * zoom, -angle.sin(), shift[:, 0], angle.sin(), angle.cos() * zoom, shift[:, 1]]
    grid = F.affine_grid(torch.stack(rows, 1).view(count, 2, 3), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    images = vary_colours(images, 0.06, 0.5)
    noise = torch.randn_like(images) * uniform(count, 0, 0.03, device).view(-1, 1, 1, 1)
    return (images + noise).clamp(0, 1)
