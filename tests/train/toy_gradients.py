"""A toy network, and gradients of its losses image by image in float64: an oracle that knows how the toy and the two
alignment losses are computed, and nothing of the code that measures."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from haste.config import Positive, Strict
from haste.data import order
from haste.files.store import Store
from haste.models.denoiser import Denoiser
from haste.models.layers import AttentionTap
from haste.networks.spec import Tap
from haste.teachers import targets


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.mlp = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        """(B, N, D) -> the same, and queries and keys of two heads, each (B, 2, N, D / 2)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return x + torch.tanh(self.mlp(x)), q, k


class Toy(Denoiser):
    """Three blocks on the latents' cells."""

    class Settings(Strict):
        width: Positive

    def __init__(self, *, input_size, in_channels, classes, width):
        super().__init__(input_size=input_size, in_channels=in_channels, classes=classes)
        grid = (input_size, input_size)
        self.taps = {f"tokens.{m}": Tap(grid, width) for m in (1, 2, 3)}
        self.taps |= {f"attention.{i}": Tap(grid, width, 2) for i in range(3)}
        self.cells, self.label = nn.Linear(in_channels, width), nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.out = nn.Linear(width, in_channels)

    def forward(self, x, t, y, taps=()):
        tokens = self.cells(x.flatten(2).mT) + (self.label(y) * t[:, None])[:, None]
        tapped = {}
        for i, block in enumerate(self.blocks):
            tokens, q, k = block(tokens)
            tapped |= {f"attention.{i}": AttentionTap(q, k, None), f"tokens.{i + 1}": tokens}
        return self.out(tokens).mT.unflatten(2, x.shape[2:]), {name: tapped[name] for name in taps}


class NoBlocks(Toy):
    """As if it had no list."""

    block_list = ()


ALIGNED = {
    "features": {"teacher": "vit", "depth": 2, "hidden": 16, "weight": 0.7, "warmup": 20},
    "attention": {"teacher": "vit", "student_layers": [1, 2], "teacher_layers": [0, 1], "weight": 1.5, "t_min": 0.3},
}


def image_gradients(plan, tensors, image, t, block, warm=1.0):
    """Of one image: flat gradients of the weighted feature loss, of the weighted attention loss, of denoising.

    warm: share of its weight that the feature loss has during warm-up.
    """
    with Store.open(plan.latents.folder) as latents, Store.open(plan.images.folder) as images:
        moments = torch.from_numpy(latents.read("moments", [image])).double()
        label = torch.from_numpy(latents.read("label", [image]))
        pixels = torch.from_numpy(images.read("image", [image]))
        scale, shift = latents.manifest["scale"], latents.manifest["shift"]
    seen = targets.load_teacher(plan, "vit").to(torch.device("cpu"), torch.float64)(
        pixels, features=True, attention=[0, 1]
    )
    mean, std = moments.chunk(2, dim=1)
    n, eps = (
        torch.from_numpy(order.normals(0, purpose, 0, [image], mean.shape[1:])).double()
        for purpose in ("measured latent draw", "measured noise")
    )
    z = (mean + std * n - shift) * scale
    model = Toy(input_size=4, in_channels=4, classes=10, width=16).double()
    model.load_state_dict({k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")})
    wanted = {"tokens.2", "attention.1", "attention.2"}
    t = float(np.float32(t))  # times are float32
    velocity, taps = model((1 - t) * z + t * eps, torch.tensor([t], dtype=torch.float64), label, taps=wanted)
    head = [tensors[f"projectors/features/{i}.{part}"] for i in (0, 2, 4) for part in ("weight", "bias")]
    tokens = coarser(taps["tokens.2"])
    for weight, bias in zip(head[::2], head[1::2], strict=True):
        tokens = functional.linear(functional.silu(tokens) if weight is not head[0] else tokens, weight, bias)
    features = -functional.cosine_similarity(tokens, seen.features, dim=-1).mean() * 0.7 * warm
    pairs = []
    for mine, theirs in ((1, 0), (2, 1)):
        q, k = (coarser(x) for x in taps[f"attention.{mine}"][:2])
        p, s = seen.attention[theirs], (q @ k.mT / math.sqrt(8)).log_softmax(-1)
        pairs.append(-((p[0] @ p[1].mT / math.sqrt(8)).softmax(-1) * s).sum(-1).mean())
    attention = 1.5 * (pairs[0] + pairs[1]) / 2
    losses = [features, attention, ((velocity - (eps - z)) ** 2).mean()]
    parameters = list(model.blocks[block - 1].parameters())
    found = []
    for loss in losses:
        model.zero_grad()
        loss.backward(retain_graph=True)
        found.append(torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]))
    return [gradient.double().numpy() for gradient in found]


def hidden_state(plan, tensors, image, t, layer, weights="ema"):
    """The mean over the tokens after a block, of one noised image, with the null class: (1, D) float64."""
    return tapped(plan, tensors, image, t, f"tokens.{layer}", weights).mean(1)


@torch.no_grad()
def tapped(plan, tensors, image, t, name, weights="ema"):
    """A tap of one noised image, with the null class, in float64."""
    with Store.open(plan.latents.folder) as latents:
        mean, std = torch.from_numpy(latents.read("moments", [image])).double().chunk(2, dim=1)
        scale, shift = latents.manifest["scale"], latents.manifest["shift"]
    n, eps = (
        torch.from_numpy(order.normals(0, purpose, 0, [image], mean.shape[1:])).double()
        for purpose in ("measured latent draw", "measured noise")
    )
    model = Toy(input_size=4, in_channels=4, classes=10, width=16).double()
    of = {name.removeprefix(f"{weights}/"): v for name, v in tensors.items() if name.startswith(f"{weights}/")}
    model.load_state_dict(of)
    x_t = (1 - t) * (mean + std * n - shift) * scale + t * eps
    return model(x_t, torch.tensor([t]).double(), torch.tensor([10]), {name})[1][name]


def coarser(tokens):
    """(..., 16, D) of a grid of 4 x 4 on the teacher's, of 2 x 2."""
    return tokens.unflatten(-2, (2, 2, 2, 2)).mean(dim=(-4, -2)).flatten(-3, -2)


def cosine(a, d):
    return a @ d / np.sqrt((a @ a) * (d @ d))
