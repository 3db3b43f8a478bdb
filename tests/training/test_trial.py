"""A task that is not as the protocol says is told about before anything is trained or written."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import niwaki
from niwaki.errors import InputError
from niwaki.tasks import Data, Metric, Model, Task, Training
from niwaki.tasks.user import TaskFileError, load
from niwaki.training import job, run

INPUTS = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
EXAMPLES = TensorDataset(INPUTS, (INPUTS.sum(dim=1) > 0).long())


def network(inputs=4):
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


TASK = Task(
    name="sums",
    models={"mlp": Model(lambda data: network(), Training(epochs=1, batch_size=10, threads=1))},
    data=lambda folder: Data(EXAMPLES, EXAMPLES),
    loss=functional.cross_entropy,
    metrics={"accuracy": Metric(lambda outputs, targets: outputs.argmax(1) == targets, "share of right answers")},
)


def metric(values):
    return {"metrics": {"accuracy": Metric(values, "share of right answers")}}


class NoLength:
    def __getitem__(self, indices):
        return EXAMPLES[indices]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"metrics": {}}, "sums has no metrics; a task needs at least one"),
        ({"models": {}}, "sums has no models; a task needs at least one"),
        ({"data": lambda folder: None}, "data of sums returned None; expected Data"),
        ({"data": lambda folder: (EXAMPLES, EXAMPLES)}, "data of sums returned a tuple of 2; expected Data"),
        ({"data": lambda folder: Data(NoLength(), EXAMPLES)}, "the training examples of sums have no length"),
        ({"data": lambda folder: Data(EXAMPLES, TensorDataset(INPUTS))}, "a batch of test examples of sums is a tuple of 1"),
        (
            {"models": {"mlp": Model(lambda data: None, Training(epochs=1, batch_size=10))}},
            "building the model 'mlp' of sums returned NoneType",
        ),
        (
            {"loss": lambda o, t: functional.cross_entropy(o, t, reduction="none")},
            r"loss of sums returned a tensor of shape \[8\]; expected",
        ),
        (
            {"loss": lambda o, t: functional.cross_entropy(o, t).item()},
            "loss of sums returned an object of type float; expected one number",
        ),
        ({"loss": lambda o, t: o.detach().mean()}, r"loss of sums returned a tensor of shape \[\] without gradients"),
        (metric(lambda o, t: (o.argmax(1) == t).float().mean()), r"the metric 'accuracy' of sums returned a tensor of shape \[\]"),
        (
            metric(lambda o, t: functional.one_hot(t, 2)),
            r"returned a tensor of shape \[8, 2\] without gradients for 8 examples; expected one",
        ),
    ],
)
def test_what_is_wrong_is_told_before_training(tmp_path, fields, said):
    def carry_out():
        run(job(replace(TASK, **fields), niwaki.method("gmp", sparsity=0.5), method="gmp"), tmp_path / "run")

    with pytest.raises(InputError, match=said) as error:
        carry_out()
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


FILE = """
import torch
from training.test_trial import EXAMPLES, INPUTS, TASK, network, replace
from niwaki.tasks import Data, Model, Training

calls = []


def late(outputs, targets):
    calls.append(1)
    if len(calls) > 3:
        raise ValueError("too late")
    return torch.nn.functional.cross_entropy(outputs, targets)


loss = replace(TASK, loss=lambda outputs, targets: 1 / 0)
data = replace(TASK, data=lambda folder: open("/no such folder/file"))
shape = replace(TASK, models={"mlp": Model(lambda data: network(7), Training(epochs=1, batch_size=10, threads=1))})
labels = replace(TASK, data=lambda folder: Data(torch.utils.data.TensorDataset(INPUTS, torch.full((40,), 5)), EXAMPLES))
later = replace(TASK, loss=late)
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("loss", "loss failed: ZeroDivisionError: division by zero"),
        ("data", "data failed: FileNotFoundError"),
        ("shape", "calling the model with a batch of training inputs failed: RuntimeError: mat1 and mat2"),
        ("labels", "loss failed: IndexError: Target 5 is out of bounds"),
    ],
)
def test_errors_of_a_users_own_code_come_with_its_traceback(tmp_path, name, said):
    (tmp_path / "mine.py").write_text(FILE)
    with pytest.raises(TaskFileError, match=said) as error:
        run(job(load(f"{tmp_path / 'mine.py'}:{name}"), niwaki.method("gmp", sparsity=0.5), method="gmp"), tmp_path / "run")
    assert "Traceback" in error.value.details
    assert "niwaki/tasks/user.py" not in error.value.details
    assert not (tmp_path / "run").exists()


def test_errors_while_training_keep_the_traceback(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    made = job(load(f"{tmp_path / 'mine.py'}:later"), niwaki.method("gmp", sparsity=0.5), method="gmp")
    with pytest.raises(niwaki.NiwakiError, match=r"^dense training stopped at step 2 of 4: .*loss failed: ValueError: too late") as error:
        run(made, tmp_path / "run")
    assert "too late" in error.value.details
