"""Small real training problems that many tests share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import niwaki


class Net(nn.Module):
    """Two convolutions, a batch norm and three linear layers: conv2, fc1 and fc2 are targets (not the first convolution or last layer)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(8 * 4 * 4, 24)
        self.fc2 = nn.Linear(24, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        x = torch.relu(self.conv2(x)).flatten(1)
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


TARGETS = ("conv2.weight", "fc1.weight", "fc2.weight")
TARGET_ELEMENTS = 8 * 4 * 9 + 24 * 128 + 16 * 24


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().to(dtype)


def batch(step: int, size: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The batch of a step: the label is a fixed linear function of the image, so there is something to learn."""
    generator = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64)
    teacher = torch.randn(64, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return images.to(dtype), (images.flatten(1) @ teacher).argmax(1)


def train(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    steps: range,
    after: Callable[[int], None] = lambda step: None,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """A plain training loop that knows nothing of sparsity; returns the losses."""
    losses = []
    for step in steps:
        images, labels = batch(step, dtype=dtype)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        after(step)
    return losses


GMP = "sparsity: 0.9\nallocation: global\nschedule: {cubic: {every: 3 steps, end: 0.75 run}}"
RIGL = "sparsity: 0.8\nallocation: erdos_renyi_kernel\nschedule: {constant: {every: 4 steps, end: 0.75 run}}\ngrowth: gradient"
SET = "sparsity: 0.8\nschedule: {constant: {every: 4 steps, end: 0.75 run}}\ngrowth: {random: {fraction: 0.3}}"
STATIC = "sparsity: 0.8\nsaliency: random"
TOP_KAST = (
    "sparsity: 0.8\nschedule: {constant: {every: 1 steps}}\nrelaxation: latent\ngradient: {superset: {sparsity: 0.6}}\n"
    "penalty: {exploration_l2: {strength: 1e-4}}"
)
DPF = "sparsity: 0.8\nschedule: {cubic: {every: 4 steps, end: 0.75 run}}\nrelaxation: latent\ngradient: dense"
STR = "relaxation: {soft_threshold: {initial: -3.0}}"
MOVEMENT = (
    "sparsity: 0.8\nsaliency: score\nallocation: global\nrelaxation: {straight_through: {learning_rate: 1e-2}}\n"
    "schedule: {cubic: {begin: 0.1 run, every: 1 steps, end: 0.7 run}}"
)
EDGE_POPUP = (
    "sparsity: 0.5\nsaliency: score\nrelaxation: {straight_through: {scores: uniform, learning_rate: 1e-1}}\ngradient: frozen\n"
    "schedule: {constant: {every: 1 steps}}"
)
MOMENTUM = (
    "sparsity: 0.8\nschedule: {constant: {every: 4 steps, end: 0.75 run}}\n"
    "growth: {momentum: {fraction: 0.3, initial_value: {normal: {scale: 0.5}}}}"
)
REWIRING = "sparsity: 0.8\nschedule: {constant: {every: 1 steps, end: 1 run}}\ngrowth: {rewiring: {strength: 1e-3, temperature: 1e-5}}"
SOFT_REWIRING = "relaxation: {soft_rewiring: {density: 0.2, strength: 1e-3, temperature: 1e-6}}"
SURGERY = (
    "selection: {hysteresis: {rate: 0.2, gamma: 0.1}}\nschedule: {constant: {every: 1 steps, end: 0.75 run}}\nrelaxation: latent\n"
    "gradient: dense"
)
GUMBEL = "sparsity: 0.8\nselection: gumbel\nschedule: {constant: {every: 4 steps, end: 0.75 run}}\nrelaxation: latent\ngradient: dense"
SELECTED = "sparsity: 0.8\nallocation: global\nschedule: {one_shot: {at: 0.25 run}}\ngradient: selected"
RECIPES = {
    "gmp": GMP,
    "rigl": RIGL,
    "set": SET,
    "static": STATIC,
    "top_kast": TOP_KAST,
    "dpf": DPF,
    "str": STR,
    "movement": MOVEMENT,
    "edge_popup": EDGE_POPUP,
    "momentum": MOMENTUM,
    "rewiring": REWIRING,
    "soft_rewiring": SOFT_REWIRING,
    "surgery": SURGERY,
    "gumbel": GUMBEL,
    "selected": SELECTED,
}


def recipe(text: str) -> niwaki.Recipe:
    return niwaki.Recipe.from_yaml(text)


def pruned_are_zero(model: nn.Module, masks: niwaki.Masks) -> bool:
    """Whether every masked weight is +0.0 (not -0.0, not NaN)."""
    parameters = dict(model.named_parameters())
    return all(
        not parameters[n].detach()[~mask].view(torch.int32 if parameters[n].element_size() == 4 else torch.int64).any()
        for n, mask in masks.items()
    )
