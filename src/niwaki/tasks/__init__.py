"""Built-in tasks, by name, and how any task is found: built in, or a user's own."""

from __future__ import annotations

from dataclasses import replace

from niwaki.errors import InputError, did_you_mean
from niwaki.tasks.digits import DIGITS
from niwaki.tasks.images import CIFAR10, FASHION_MNIST, MNIST
from niwaki.tasks.protocol import Data, Examples, Inputs, Metric, Model, Subset, Task, Training
from niwaki.tasks.sentences import SENTENCES, SST2
from niwaki.tasks.text import CHARACTERS

TASKS: dict[str, Task] = {task.name: task for task in (DIGITS, MNIST, FASHION_MNIST, CIFAR10, CHARACTERS, SST2, SENTENCES)}
"""Task name -> task."""


def find(name: str, model: str | None = None) -> Task:
    """Return a task: built in, or ``path/to/file.py:object``; with a model ``timm:NAME`` or ``hf:FOLDER`` the task has that model too.

    Raises:
        InputError: there is no such task or model, or the file cannot be imported.
    """
    if name in TASKS:
        task = TASKS[name]
    elif ".py" in name:
        from niwaki.tasks import user

        task = user.load(name)
    else:
        raise InputError(f"--task: there is no task {name!r}; {did_you_mean(name, TASKS)}; your own: path/to/file.py:object")
    source, _, rest = (model or "").partition(":")
    if source == "timm":
        from niwaki.tasks import timm

        return replace(task, models={**task.models, str(model): timm.model(rest)})
    if source == "hf":
        from niwaki.tasks import huggingface

        return huggingface.adapt(task, rest)
    return task


__all__ = ["TASKS", "Data", "Examples", "Inputs", "Metric", "Model", "Subset", "Task", "Training", "find"]
