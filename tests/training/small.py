"""Small tasks that train in a moment, and trainings of them that stop and go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import niwaki
from niwaki.recipe import Recipe
from niwaki.recipe.stages import validates
from niwaki.tasks import Data, Metric, Model, Task, Training
from niwaki.training import Job, checkpoint, job
from niwaki.training.loop import hold_out
from niwaki.training.state import Interrupted, Trained
from niwaki.training.trainer import Trainer

ACCURACY = Metric(lambda outputs, targets: outputs.argmax(1) == targets, "share of right answers")
TARGETS = {"0.weight": (24, 6), "3.weight": (16, 24)}
"""Of the small network: every linear layer but the last."""
ELEMENTS = 24 * 6 + 16 * 24


def examples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator)
    return TensorDataset(inputs, (inputs @ torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0, 1.0]) > 0).long())


def network(data: Data) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2))


def without_batch_norm(data: Data) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.Identity(), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2))


def with_dropout(data: Data) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.Dropout(0.2), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2))


def in_fours(data: Data) -> nn.Module:
    """Every width is a multiple of four."""
    return nn.Sequential(nn.ConstantPad1d((0, 2), 0.0), nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2))


def with_norms(data: Data) -> nn.Module:
    hidden = [nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.BatchNorm1d(16), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(16, 2))


class _Block(nn.Module):
    """Attention of two heads to three tokens, with a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(x)
        query, key, value = (part(seen).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.query, self.key, self.value))
        attended = ((query @ key.transpose(-1, -2)) / 2).softmax(dim=-1) @ value
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Attentive(nn.Module):
    """Three tokens, two blocks, a classifier of their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 24)
        self.blocks = nn.ModuleList(_Block() for _ in range(2))
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(x).view(-1, 3, 8)
        for block in self.blocks:
            tokens = block(tokens)
        outputs: Tensor = self.last(tokens.sum(dim=1))
        return outputs


def plane(**fields: Any) -> Task:
    """Return a classification task: which side of a plane a point lies on."""
    training = Training(epochs=4, batch_size=16, learning_rate=0.1, threads=1)
    builders = {"small": network, "plain": without_batch_norm, "dropout": with_dropout, "norms": with_norms, "fours": in_fours}
    builders["attention"] = lambda data: Attentive()
    given: dict[str, Any] = {
        "name": "plane",
        "models": {name: Model(build, training) for name, build in builders.items()},
        "data": lambda folder: Data(examples(200, 0), examples(90, 1), classes=("below", "above")),
        "loss": functional.cross_entropy,
        "metrics": {"accuracy": ACCURACY},
    }
    return Task(**given | fields)


def regression(dtype: torch.dtype = torch.float32) -> Task:
    """Return a task with 40 examples and one linear layer, whose gradients are a line of algebra."""
    inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    both = TensorDataset(inputs, inputs @ torch.tensor([[1.0], [2.0], [-1.0]], dtype=dtype))
    return Task(
        name="regression",
        models={"linear": Model(lambda data: nn.Linear(3, 1, dtype=dtype), Training(epochs=1, batch_size=8))},
        data=lambda folder: Data(both, both),
        loss=functional.mse_loss,
        metrics={"error": Metric(lambda outputs, targets: (outputs - targets).square().mean(1), "mean squared error", False, False)},
    )


def recipe(text: str | None) -> Recipe | None:
    return None if text is None else Recipe.from_yaml(text)


def trainer(text: str | None = None, *, task: Task | None = None, model: str | None = None, seed: int = 0, **settings: Any) -> Trainer:
    """Return a trainer of a new model, for a recipe in YAML or a dense training; its teacher, if one is needed, is a model of its own."""
    task = task or plane()
    name, chosen = task.model(model)
    data, asked = task.data(None), recipe(text)
    if asked is not None and validates(asked):
        data = hold_out(data, 0.2, seed)
    training = Training.model_validate(chosen.training.model_dump() | settings)
    teacher = task.build(name, data, seed + 1).eval()
    return Trainer(
        task.build(name, data, seed), task, data, training, seed, asked, teacher, build=lambda stream: task.build(name, data, stream)
    )


def make(task: Task, method: str = "gmp", sparsity: float | None = 0.75, seed: int = 0, recipe: Recipe | None = None, **given: Any) -> Job:
    """Return the job of a method or a recipe; what is given is an argument of ``job``, or a setting of the training."""
    recipe = recipe or niwaki.method(method, sparsity=sparsity)
    arguments = {name: given.pop(name) for name in ("start", "kind", "model") if name in given}
    return job(task, recipe, method=method, seed=seed, training=given, **arguments)


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a model's state."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def in_sittings(make: Callable[[], Trainer], file: Path, steps: int) -> tuple[Trainer, Trained, int]:
    """Train with a stop after every ``steps`` steps, each time going on with a new trainer from the file; return how many there were."""
    for sitting in range(1, 1000):
        trainer, taken = make(), 0
        if file.exists():
            trainer.load(checkpoint.load(file))

        def stop() -> bool:
            nonlocal taken
            taken += 1
            return taken >= steps

        try:
            return trainer, trainer.run(save=lambda state: checkpoint.save(file, state()), every=1e9, stop=stop), sitting
        except Interrupted:
            continue
    raise AssertionError("it never ends")
