"""An agent that learns how sparse each layer should be: AutoML for model compression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from niwaki.allocation.base import Allocation, Evidence
from niwaki.allocation.layer import Layer
from niwaki.allocation.sharing import bounded, largest_remainder
from niwaki.allocation.trials import Losses, generator
from niwaki.selection import kept

HIDDEN, BATCH, MEMORY = 32, 32, 2000
LEARNING_RATE, FOLLOWING_RATE = 1e-2, 1e-2
NOISE, NOISE_DECAY = 0.5, 0.95
BASELINE_DECAY = 0.95
TINY = 1e-300
HIGHEST = 0.99
"""Most that the agent may take of a layer, unless the total asks for more of all."""


class Amc(Allocation):
    """A small agent goes through the layers, says how sparse each becomes, and learns from the loss that follows (DDPG).

    It sees a layer's place and shape, what is gone and what is to come, and its last action. An action of 0.5 gives a layer the
    sparsity that all layers to come need; 0 and 1 are the bounds within which those can still meet the total, which is met exactly. (The
    published agent's action is the sparsity itself, cut off at the bounds.) All steps of an episode have the same reward: by how much
    the loss is below the uniform budget's, relative to both. The uniform budget is tried first, and the best budget that was tried is
    returned. It takes a pass over the data for each episode at every update of the masks. With few layers random actions find as good
    budgets in as many trials.

    Attributes:
        episodes: budgets that are tried.
        explore: the first of them, whose actions are random, before the agent learns.

    Raises:
        InputError: no budget has a finite loss.

    >>> from niwaki.layout import Layout
    >>> layers = [Layer(name, Layout(("output", "input"), (10, 10)), 100) for name in "ab"]
    >>> loss = lambda counts: 10.0 / (counts[0] + 1) + 90.0 / (counts[1] + 1)
    >>> keep = Amc(episodes=20, explore=10).keep(0.8, layers, evidence=Evidence(loss=loss))
    >>> sum(keep), loss(keep) < loss([20, 20])
    (40, True)
    """

    name = "amc"
    equation = (
        "a_l = μ(state_l) + noise; reward r = (U - L) / (|U| + |L|) of all steps, U: uniform's L; Q(s, a) → r - mean r + Q'(s', μ'(s'))"
    )
    source = "He, Lin, Liu, Wang, Li, Han 2018 (AMC); Lillicrap et al. 2015 (DDPG)"
    effort = "a pass over the data for each episode, at every update"
    advice = "as evolutionary; many layers and some hundred episodes"

    episodes: Annotated[int, Field(ge=1, le=100_000)] = 200
    explore: Annotated[int, Field(ge=0)] = 50

    @property
    def wants(self) -> frozenset[str]:  # noqa: D102
        return frozenset({"loss"})

    def counts(self, sparsity: float, layers: Sequence[Layer], final: float, evidence: Evidence) -> list[int]:
        """Return the best counts that the agent has tried.

        Raises:
            InputError: none has a finite loss.
        """
        pieces, limits = [layer.pieces for layer in layers], evidence.limits(layers)
        total = kept(sparsity, sum(pieces))
        agent, losses = _Agent(generator(evidence, self.name)), Losses(evidence, self.name)

        def loss_of(sparsities: Sequence[float]) -> float:
            quotas = [(1.0 - s) * n for s, n in zip(sparsities, pieces, strict=True)]
            return losses(largest_remainder(bounded(quotas, total, limits), total, limits))

        uniform = loss_of([sparsity] * len(layers))
        for episode in range(self.episodes):
            noise = None if episode < self.explore else NOISE * NOISE_DECAY ** (episode - self.explore)
            states, actions, sparsities = _episode(agent, noise, layers, sparsity)
            loss = loss_of(sparsities)
            finite = max(uniform, loss) < math.inf
            reward = (uniform - loss) / max(abs(uniform) + abs(loss), TINY) if finite else float(loss < uniform) - 1.0
            agent.remember(states, actions, reward)
            if episode >= self.explore:
                agent.learn(len(layers))
        return losses.best


def _episode(
    agent: _Agent, noise: float | None, layers: Sequence[Layer], sparsity: float
) -> tuple[list[list[float]], list[float], list[float]]:
    """Return the states that the agent saw, its actions, and the sparsities that they are, with ``sum s_l N_l = S sum N_l``."""
    everything = sum(layer.pieces for layer in layers)
    sizes = [(one.layout.outputs, one.layout.size("input"), math.prod(one.layout.kernel)) for one in layers]
    shapes = [[math.log1p(n) for n in own] for own in sizes]
    largest = [max(own) for own in zip(*shapes, strict=True)]
    highest = max(HIGHEST, sparsity)
    to_go, rest, last = sparsity * everything, everything, 1.0
    states, actions, sparsities = [], [], []
    for i, layer in enumerate(layers):
        shape = [own / most for own, most in zip(shapes[i], largest, strict=True)]
        states.append([i / len(layers), *shape, layer.pieces / everything, to_go / everything, rest / everything, last])
        alike = to_go / rest
        rest -= layer.pieces
        lowest = max((to_go - highest * rest) / layer.pieces, 0.0)
        most = max(min(to_go / layer.pieces, highest), lowest)
        actions.append(agent.act(states[-1], noise))
        last = float(np.interp(actions[-1], [0.0, 0.5, 1.0], [lowest, min(max(alike, lowest), most), most]))
        to_go -= last * layer.pieces
        sparsities.append(last)
    return states, actions, sparsities


class _Step(NamedTuple):
    state: list[float]
    action: float
    reward: float
    following: list[float] | None


class _Network:
    """Two hidden layers of rectified units, with random numbers of its own."""

    def __init__(self, random: np.random.Generator, inputs: int) -> None:
        sizes = [inputs, HIDDEN, HIDDEN, 1]
        weights = [random.normal(0.0, (2.0 / n) ** 0.5, (m, n)) for n, m in pairwise(sizes)]
        weights[-1] *= 0.01  # so that the first outputs are near zero
        self.parameters = [torch.tensor(w, requires_grad=True) for w in weights]
        self.parameters += [torch.zeros(m, dtype=torch.float64, requires_grad=True) for m in sizes[1:]]

    def __call__(self, inputs: Tensor) -> Tensor:
        for layer in range(3):
            inputs = torch.nn.functional.linear(inputs, self.parameters[layer], self.parameters[3 + layer])
            inputs = inputs.relu() if layer < 2 else inputs
        return inputs[:, 0]

    def follow(self, other: _Network, rate: float) -> None:
        """Move towards the parameters of another network."""
        with torch.no_grad():
            for mine, theirs in zip(self.parameters, other.parameters, strict=True):
                mine.lerp_(theirs, rate)


class _Agent:
    """Deep deterministic policy gradient: an actor, a critic, and slow copies of both."""

    STATE = 8

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.actor, self.slow_actor = (_Network(random, self.STATE) for _ in range(2))
        self.critic, self.slow_critic = (_Network(random, self.STATE + 1) for _ in range(2))
        self.slow_actor.follow(self.actor, 1.0)
        self.slow_critic.follow(self.critic, 1.0)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters, lr=LEARNING_RATE)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters, lr=LEARNING_RATE)
        self.memory: list[_Step] = []
        self.baseline = 0.0

    def act(self, state: list[float], noise: float | None) -> float:
        """Return an action in [0, 1]: a random one, or the actor's with normal noise, drawn again until it is in the range."""
        if noise is None:
            return float(self.random.random())
        with torch.no_grad():
            mean = float(self.actor(torch.tensor([state], dtype=torch.float64)).sigmoid())
        while not 0.0 <= (action := mean + noise * float(self.random.normal())) <= 1.0:
            pass
        return action

    def remember(self, states: Sequence[list[float]], actions: Sequence[float], reward: float) -> None:
        """Add an episode to the memory."""
        self.baseline = BASELINE_DECAY * self.baseline + (1.0 - BASELINE_DECAY) * reward if self.memory else reward
        self.memory += [_Step(s, a, reward, n) for s, a, n in zip(states, actions, [*states[1:], None], strict=True)]
        self.memory = self.memory[-MEMORY:]

    def learn(self, times: int) -> None:
        """Take steps on random parts of the memory."""
        with torch.enable_grad():
            for _ in range(times):
                self._learn([self.memory[i] for i in self.random.integers(len(self.memory), size=BATCH)])

    def _learn(self, steps: Sequence[_Step]) -> None:
        states = torch.tensor([step.state for step in steps], dtype=torch.float64)
        actions = torch.tensor([step.action for step in steps], dtype=torch.float64)
        following = torch.tensor([step.following or step.state for step in steps], dtype=torch.float64)
        goes_on = torch.tensor([step.following is not None for step in steps], dtype=torch.float64)
        goal = torch.tensor([step.reward - self.baseline for step in steps], dtype=torch.float64)
        with torch.no_grad():
            goal += goes_on * _value(self.slow_critic, following, self.slow_actor(following).sigmoid())
        _step(self.critic_optimizer, (_value(self.critic, states, actions) - goal).square().mean())
        _step(self.actor_optimizer, -_value(self.critic, states, self.actor(states).sigmoid()).mean())
        self.slow_actor.follow(self.actor, FOLLOWING_RATE)
        self.slow_critic.follow(self.critic, FOLLOWING_RATE)


def _value(critic: _Network, states: Tensor, actions: Tensor) -> Tensor:
    return critic(torch.cat([states, actions[:, None]], dim=1))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
