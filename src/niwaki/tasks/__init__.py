"""Built-in tasks, by name."""

from niwaki.errors import InputError, did_you_mean
from niwaki.tasks.digits import DIGITS
from niwaki.tasks.protocol import Data, Examples, Metric, Model, Task, Training

TASKS: dict[str, Task] = {task.name: task for task in (DIGITS,)}
"""Task name -> task."""


def task(name: str) -> Task:
    """Return a built-in task. Raises InputError for an unknown name."""
    if name not in TASKS:
        raise InputError(f"--task: there is no task {name!r}; {did_you_mean(name, TASKS)}")
    return TASKS[name]


__all__ = ["TASKS", "Data", "Examples", "Metric", "Model", "Task", "Training", "task"]
