"""``torchrun -m niwaki run``: several processes train one run; stopped and given again it ends as if nothing had happened."""

import os
import re
import shlex
import signal
from pathlib import Path

import pytest
from cli.driving import essence, start, until
from safetensors.torch import load_file

TASK = '''
import hashlib, os

import torch
from torch import nn
from torch.utils.data import TensorDataset

from niwaki.tasks import Data, Metric, Model, Task, Training


def data(folder):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(257, 12, generator=generator)  # batches and their halves are of several sizes
    labels = (inputs[:, :4] * inputs[:, 4:8]).sum(dim=1).gt(0).long()
    return Data(TensorDataset(inputs[:193], labels[:193]), TensorDataset(inputs[193:], labels[193:]), classes=("no", "yes"))


class Network(nn.Sequential):
    """Writes down what is zero in it whenever it learns."""

    def forward(self, inputs):
        if self.training and os.path.isdir("zeros"):
            zeros = hashlib.sha256(b"".join((layer.weight == 0).numpy().tobytes() for layer in self if isinstance(layer, nn.Linear)))
            with open(f"zeros/{os.environ.get('RANK', '0')}", "a") as file:
                print(zeros.hexdigest(), file=file)
        return super().forward(inputs)


def network(data):
    return Network(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))


task = Task(
    name="sign of a product",
    models={"mlp": Model(network, Training(epochs=30, batch_size=16, learning_rate=0.05, threads=1))},
    data=data,
    loss=nn.functional.cross_entropy,
    metrics={"accuracy": Metric(lambda outputs, labels: outputs.argmax(dim=1) == labels, "share of right answers")},
)
'''
RUN = ("run", "rigl", "--task", "task.py:task", "--sparsity", "0.8", "--checkpoint-every", "0.05", "--out", "run")
STEPS = 30 * 13
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "niwaki")


def fresh(folder: Path) -> Path:
    folder.mkdir()
    (folder / "task.py").write_text(TASK)
    return folder


def finished(folder: Path, *arguments: str, launcher: tuple[str, ...] = TWO) -> str:
    process = start(folder, *RUN, *arguments, launcher=launcher)
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert "Traceback" not in error
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """The same run with one process, and with two."""
    found = {}
    for number, launcher in ((1, ("-m", "niwaki")), (2, TWO)):
        found[number] = fresh(tmp_path_factory.mktemp("processes") / str(number))
        (found[number] / "zeros").mkdir()
        out = finished(found[number], launcher=launcher)
        assert out.count("accuracy") == 1  # of two processes, one speaks
    return found


def test_two_processes_do_what_one_does(folders):
    one, two = (essence(folders[number] / "run") for number in (1, 2))
    assert [run["choices"]["processes"] for run in (one, two)] == [1, 2]
    assert one["identity"] != two["identity"]
    for history in ("dense_history", "sparse_history"):
        first, second = (run["results"][history] for run in (one, two))
        assert len(first) == len(second) == 30
        for fact in ("step", "sparsity", "learning_rate"):
            assert [epoch[fact] for epoch in first] == [epoch[fact] for epoch in second]
    for name in ("sparsity of the targets", "forward FLOPs", "training FLOPs"):
        values = [next(m["sparse"] for m in run["results"]["measures"] if m["name"] == name) for run in (one, two)]
        assert values[0] == values[1]
    dense = [load_file(next(folders[number].glob(".baselines/*/model.safetensors"))) for number in (1, 2)]
    for name, weight in dense[0].items():
        assert (weight - dense[1][name]).norm() < 0.02 * weight.norm()


def test_the_training_loss_is_that_of_the_whole_batch(folders):
    losses = [[epoch["train_loss"] for epoch in essence(folders[number] / "run")["results"]["dense_history"]] for number in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_the_processes_have_the_same_zeros_at_every_step(folders):
    first, second = ((folders[2] / "zeros" / rank).read_text().splitlines() for rank in ("0", "1"))
    assert first == second
    assert len(first) >= 2 * STEPS
    assert len(set(first)) > 3  # dense, the first masks, and two updates


def workers(process) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_stopped_and_given_again_it_ends_as_if_it_had_not_been(folders, tmp_path):
    folder = fresh(tmp_path / "runs")
    process = start(folder, *RUN, launcher=TWO)
    until(lambda: any(folder.glob(".baselines/*/checkpoint.safetensors")), process)
    os.kill(workers(process)[1], signal.SIGKILL)  # one of the processes is lost: torchrun ends the other
    process.communicate(timeout=120)
    assert process.returncode == 1
    process = start(folder, *RUN, launcher=TWO)
    until((folder / "run" / "checkpoint.safetensors").exists, process)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    out, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out == ""
    assert len(re.findall("niwaki: error:", error)) == 1
    [again] = re.findall("sparse training interrupted at step .*; to go on, give the same command again: (.*)", error)
    assert shlex.split(again) == ["torchrun", "--nproc-per-node", "2", "-m", "niwaki", *RUN]
    finished(folder)
    assert (folder / "run" / "model.safetensors").read_bytes() == (folders[2] / "run" / "model.safetensors").read_bytes()
    assert essence(folder / "run") == essence(folders[2] / "run")


def test_a_run_of_two_processes_is_not_that_of_one(folders):
    process = start(folders[2], *RUN)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "holds another run (processes 2 there, 1 here)" in error


def test_of_bad_input_one_process_speaks(tmp_path):
    process = start(fresh(tmp_path / "runs"), *RUN, "--set", "learning_rat=1", launcher=TWO)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1  # torchrun's own
    assert error.count("niwaki: error:") == 1
    assert "did you mean 'learning_rate'?" in error
