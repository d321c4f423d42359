"""A linear classifier on features, by the protocol of MAE (arXiv 2111.06377) as REPA has it: batch normalisation
without parameters, a linear layer, Adam. n features, D width, K classes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from haste.data import order

EPS = 1e-6  # of the batch normalisation
STD = 0.01  # of the first weights
AT_ONCE = 65_536  # features that are classified at once


@dataclasses.dataclass(frozen=True)
class Training:
    """How a classifier is trained. epochs and warmup in passes over the features, lr the highest rate."""

    epochs: int
    warmup: int
    batch: int
    lr: float
    seed: int

    def rate(self, epoch: float) -> float:
        """The rate after a number of epochs: from 0 evenly to `lr` over the warm-up, then to 0 along half a cosine."""
        if epoch < self.warmup:
            return self.lr * epoch / self.warmup
        return self.lr * (1 + math.cos(math.pi * (epoch - self.warmup) / (self.epochs - self.warmup))) / 2


def trained(
    features: NDArray[np.float32], labels: NDArray[np.int64], classes: int, how: Training, device: torch.device | str
) -> nn.Sequential:
    """A trained classifier, in evaluation mode.

    Args:
        features: (n, D).
        labels: (n,) in 0 .. classes - 1.
        classes: K.
        how: see `Training`; order and first weights follow from its seed.
        device: where.
    """
    x, y = torch.from_numpy(features), torch.from_numpy(labels).to(device)
    head = nn.Linear(x.shape[1], classes)
    generator = torch.Generator().manual_seed(how.seed)
    nn.init.trunc_normal_(head.weight, std=STD, generator=generator)
    nn.init.zeros_(head.bias)
    probe = nn.Sequential(nn.BatchNorm1d(x.shape[1], eps=EPS, affine=False), head).to(x.dtype).to(device)
    optimizer, x = torch.optim.Adam(head.parameters(), lr=how.lr), x.to(device)
    batch = min(how.batch, len(x))
    steps = len(x) // batch
    for epoch in range(how.epochs):
        visits = torch.from_numpy(order.permutation(how.seed, epoch, len(x)).copy()).to(device)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = how.rate(epoch + step / steps)
            chosen = visits[step * batch : (step + 1) * batch]
            loss = functional.cross_entropy(probe(x[chosen]), y[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return probe.eval()


@torch.inference_mode()
def classes_of(probe: nn.Sequential, features: NDArray[np.float32]) -> NDArray[np.int64]:
    """The class that a classifier finds the likeliest for each of the features (n, D), (n,)."""
    device = next(probe.parameters()).device

    def likeliest(some: NDArray[np.float32]) -> Tensor:
        return probe(torch.from_numpy(some).to(device)).argmax(dim=1).cpu()

    return torch.cat([likeliest(features[low : low + AT_ONCE]) for low in range(0, len(features), AT_ONCE)]).numpy()
