"""Runs that are killed, interrupted and given again end as if nothing had happened."""

import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
from cli.driving import TASK, environment, essence, start, until
from safetensors import safe_open

from niwaki.cli import main
from niwaki.training import checkpoint

KILLS = 30
LONGEST = 4.0
"""Seconds that a process may live at most before it is killed, however slow the machine is."""
RUN = ("run", "rigl", "--task", "task.py:task", "--sparsity", "0.8", "--set", "ema=0.98", "--checkpoint-every", "0.1", "--out", "run")

processes = multiprocessing.get_context("forkserver")
PRELOADED = ("niwaki.cli.tables", "niwaki.training", "niwaki.tasks", "niwaki.report", "torch._dynamo", "matplotlib.figure")
processes.set_forkserver_preload(list(PRELOADED))  # imported once, not for each process


def command(folder: Path, arguments: tuple[str, ...]) -> None:
    """Be a niwaki process."""
    os.chdir(folder)
    os.environ.update(environment())
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    sys.exit(main(arguments))


def started(folder: Path):
    process = processes.Process(target=command, args=(folder, RUN))
    process.start()
    return process


def finished(folder: Path) -> None:
    process = started(folder)
    process.join()
    assert process.exitcode == 0


def fresh(folder: Path) -> Path:
    folder.mkdir()
    (folder / "task.py").write_text(TASK)
    return folder


def require_whole_files(folder: Path) -> None:
    """Whatever has its final name is complete, at any moment."""
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert list(file.keys())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run that nothing happens to, and the seconds that it took."""
    warm_up = processes.Process()
    warm_up.start()  # the imports
    warm_up.join()
    folder = fresh(tmp_path_factory.mktemp("whole") / "runs")
    began = time.monotonic()
    finished(folder)
    return folder, time.monotonic() - began


def require_the_same(folder: Path, uninterrupted: Path) -> None:
    assert (folder / "run" / "model.safetensors").read_bytes() == (uninterrupted / "run" / "model.safetensors").read_bytes()
    assert essence(folder / "run") == essence(uninterrupted / "run")
    assert (folder / "run" / "report.html").is_file()
    [baseline] = (folder / ".baselines").iterdir()
    assert names(folder / "run") == {"run.json", "model.safetensors", "report.html"}
    assert names(baseline) == {"baseline.json", "model.safetensors"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.timeout(600)
def test_killed_at_30_random_moments(uninterrupted, tmp_path):
    whole, seconds = uninterrupted
    draw = random.Random(30)
    longest = min(0.5 * seconds, LONGEST)
    kills, runs = 0, 0
    folder = fresh(tmp_path / "0")
    while kills < KILLS:
        process = started(folder)
        process.join(draw.uniform(0, longest))
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            require_whole_files(folder)
        else:
            assert process.exitcode == 0
            require_the_same(folder, whole)
            runs += 1
            folder = fresh(tmp_path / str(runs))
    finished(folder)
    require_the_same(folder, whole)


def stored_baseline(folder: Path) -> bool:
    return any(folder.glob(".baselines/*/baseline.json"))


MOMENTS = {
    "the dense training had a checkpoint": lambda folder: any(folder.glob(".baselines/*/checkpoint.safetensors")),
    "the dense model was stored": lambda folder: any(folder.glob(".baselines/*/model.safetensors")),
    "the dense training had ended": stored_baseline,
    "the sparse model was stored": lambda folder: (folder / "run" / "model.safetensors").exists(),
    "the record was written": lambda folder: stored_baseline(folder) and json.loads((folder / "run" / "run.json").read_text())["results"],
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_just_when(moment, uninterrupted, tmp_path):
    folder = fresh(tmp_path / "runs")
    process = started(folder)
    while process.is_alive() and not MOMENTS[moment](folder):
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert MOMENTS[moment](folder)
    require_whole_files(folder)
    finished(folder)
    require_the_same(folder, uninterrupted[0])


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM], ids=lambda asked: asked.name)
def test_asked_to_stop_it_saves_and_says_how_to_go_on(asked, uninterrupted, tmp_path):
    folder = fresh(tmp_path / "runs")
    rarely = [*RUN[:-4], "--checkpoint-every", "1000", *RUN[-2:]]  # so that what is saved was saved for the signal
    process = start(folder, *rarely)
    until(lambda: any(folder.glob(".baselines/*")), process)
    time.sleep(0.2)
    process.send_signal(asked)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert error.count("\n") == 1
    said = re.fullmatch(
        r"niwaki: error: dense training interrupted at step ([\d,]+) of 480; (\S+checkpoint.safetensors) holds all of it;"
        r" to go on, give the same command again: (niwaki run .*)\n",
        error,
    )
    assert said, error
    step, path, again = said.groups()
    assert checkpoint.load(folder / path)["trainer"]["counters"]["step"] == int(step.replace(",", ""))
    assert shlex.split(again) == ["niwaki", *rarely]
    finished(folder)
    require_the_same(folder, uninterrupted[0])


def test_stopped_after_the_dense_training_the_sparse_one_waits(uninterrupted, tmp_path):
    folder = fresh(tmp_path / "runs")
    process = start(folder, *RUN)
    until((folder / "run" / "checkpoint.safetensors").exists, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "sparse training interrupted at step" in error
    finished(folder)
    require_the_same(folder, uninterrupted[0])


def test_a_second_signal_stops_at_once(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    sleep = "    import os, time\n\n    time.sleep(1000 if os.path.exists('.baselines') else 0)\n"
    (folder / "task.py").write_text(TASK.replace("    return inputs + ", f"{sleep}    return inputs + "))
    process = start(folder, *RUN)
    until(lambda: any(folder.glob(".baselines/*")), process)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert error.strip() == "niwaki: error: interrupted"
