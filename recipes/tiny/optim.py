"""Optimizer and learning rate shared by the CLIP and the language stage.

In: a model, the share of the run that is over. Out: AdamW, a factor for the learning rate.
"""

from __future__ import annotations

import math

import torch
from torch import nn


def learning_rate(progress: float, warmup: float = 0.03, floor: float = 0.01) -> float:
    """1 at its height: a short rise, then half a cosine down to `floor`."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def build_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.08}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=matrices[0].is_cuda)
