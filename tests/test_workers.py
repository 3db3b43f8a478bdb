"""Real processes with functions that need no torch, so that each starts in a moment."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from niwaki.workers import Event, distribute

FUNCTIONS = """
import os, signal, sys, time
from pathlib import Path
from niwaki.errors import InputError, NiwakiError
from niwaki.workers import Busy

def make():
    seen = []
    def carry_out(order, tell, stopped):
        seen.append(order)
        kind, value = order
        if kind == "double":
            tell({"half": value})
            return {"result": 2 * value, "pid": os.getpid(), "seen": len(seen), "threads": os.environ.get("OMP_NUM_THREADS")}
        if kind == "fail":
            raise NiwakiError("no\\nway")
        if kind == "defect":
            return 1 / 0
        if kind == "exit":
            sys.exit("enough")
        if kind == "die":
            os.kill(os.getpid(), value)
        if kind == "leave":
            os._exit(value)
        if kind == "print":
            print("printed", flush=True)
            os.write(2, b"written")
            return None
        if kind == "busy":
            path = Path(value)
            if not path.exists():
                path.touch()
                raise Busy
            return "now it is free"
        if kind == "fork":
            if os.fork() == 0:
                time.sleep(5)
            os._exit(3)
        Path(value + f"-{os.getpid()}").touch()
        while kind == "deaf" or not stopped():
            time.sleep(0.01)
        raise NiwakiError("saved at step 7")
    return carry_out
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Carry out orders, and return the events and whether nothing stopped it."""
    (tmp_path / "functions_of_test.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))

    def go(orders, jobs=2, told=None, **more):
        events = []

        def happened(event: Event) -> None:
            events.append(event)
            if told:
                told(event)

        return events, distribute("functions_of_test:make", orders, jobs, happened, log=tmp_path / "log", **more)

    return go


def last(events, order):
    return [event for event in events if event.order == order][-1]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(true, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_orders_come_back_with_their_results_and_workers_stay(run):
    events, ended = run([["double", i] for i in range(12)])
    assert ended
    done = {event.order: event for event in events if event.kind == "done"}
    assert {order: event.content["result"] for order, event in done.items()} == {i: 2 * i for i in range(12)}
    pids = {event.content["pid"] for event in done.values()}
    assert len(pids) <= 2
    assert os.getpid() not in pids
    assert sum(event.content["seen"] == 1 for event in done.values()) == len(pids)  # each served its orders without starting again
    for i in range(12):
        kinds = [event.kind for event in events if event.order == i]
        assert kinds == ["started", "progress", "done"]
        assert next(event.content for event in events if event.order == i and event.kind == "progress") == {"half": i}
    assert not any(alive(pid) for pid in pids)


def test_no_more_workers_than_orders_or_jobs(run):
    for orders, jobs in ((1, 4), (6, 1)):
        events, _ = run([["double", i] for i in range(orders)], jobs)
        assert {event.worker for event in events} == {0}
        assert [event.order for event in events if event.kind == "done"] == list(range(orders))


def test_nothing_to_do(run):
    assert run([]) == ([], True)


def test_environment_of_workers(run):
    events, _ = run([["double", 1]], environment={"OMP_NUM_THREADS": "3"})
    assert last(events, 0).content["threads"] == "3"


@pytest.mark.parametrize(
    ("order", "said", "detail"),
    [
        (["fail", 0], "no way", ""),
        (["defect", 0], "ZeroDivisionError: division by zero", "return 1 / 0"),
        (["exit", 0], "SystemExit: enough", "sys.exit"),
        (["die", int(signal.SIGKILL)], "its process was killed (SIGKILL), perhaps for want of memory; fewer jobs need less", ""),
        (["die", int(signal.SIGSEGV)], "its process was ended by SIGSEGV", ""),
        (["leave", 5], "its process ended with exit code 5", ""),
        (["fork", 0], "its process ended with exit code 3", ""),
    ],
)
def test_a_failure_is_told_and_stops_nothing_else(run, order, said, detail):
    events, ended = run([["double", 1], order, ["double", 2], ["double", 3]])
    assert ended
    assert [last(events, i).kind for i in range(4)] == ["done", "failed", "done", "done"]
    failure = last(events, 1)
    assert failure.content == said
    assert detail in failure.detail
    assert bool(failure.detail) == bool(detail)


def test_what_workers_print_goes_to_the_log(run, tmp_path):
    events, _ = run([["print", 0]])
    assert last(events, 0).kind == "done"
    text = (tmp_path / "log").read_text()
    assert "printed\n" in text
    assert "written" in text


def test_a_busy_order_is_given_out_again_while_others_go_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr("niwaki.workers.BUSY_SECONDS", 0.2)
    events, ended = run([["busy", str(tmp_path / "mark")], ["double", 1], ["double", 2]], jobs=1)
    assert ended
    assert [event.order for event in events if event.kind == "done"] == [1, 2, 0]
    assert last(events, 0).content == "now it is free"
    assert not any(event.kind == "failed" for event in events)


@pytest.fixture
def listening():
    """Signals are not ignored, even where the tests were started with them ignored."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == [signal.default_int_handler] * 2  # given back
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def _signals_when_working(tmp_path, workers, signals):
    """Send signals to this process, one after the other, once so many workers are at an order."""

    def send():
        until(lambda: len(list(tmp_path.glob("at-*"))) == workers)
        for number in signals:
            time.sleep(0.3)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_workers_save_and_stop(run, listening, tmp_path, number):
    thread = _signals_when_working(tmp_path, 2, [number])
    events, ended = run([["work", str(tmp_path / "at")]] * 3)
    thread.join()
    assert not ended
    assert [event.kind for event in events] == ["started", "started", "stopping", "interrupted", "interrupted"]
    assert {last(events, i).content for i in (0, 1)} == {"saved at step 7"}
    assert not any(alive(path.name.rpartition("-")[2]) for path in tmp_path.glob("at-*"))


def test_a_signal_while_only_busy_orders_wait(run, listening, tmp_path, monkeypatch):
    monkeypatch.setattr("niwaki.workers.BUSY_SECONDS", 60.0)
    thread = _signals_when_working(tmp_path, 1, [signal.SIGINT])
    events, ended = run([["busy", str(tmp_path / "at-mark")]])
    thread.join()
    assert not ended
    assert [event.kind for event in events] == ["started", "stopping"]


def test_a_second_signal_kills(run, listening, tmp_path):
    thread = _signals_when_working(tmp_path, 1, [signal.SIGINT, signal.SIGINT])
    events, ended = run([["deaf", str(tmp_path / "at")]], jobs=1)
    thread.join()
    assert not ended
    assert [event.kind for event in events] == ["started", "stopping", "interrupted"]
    assert not any(alive(path.name.rpartition("-")[2]) for path in tmp_path.glob("at-*"))


def test_an_error_of_the_parent_ends_the_workers(run, tmp_path):
    def fail(event):
        if event.kind == "done":
            raise RuntimeError("the screen is gone")

    with pytest.raises(RuntimeError):
        run([["deaf", str(tmp_path / "at")], ["double", 1]], told=fail)
    until(lambda: not any(alive(path.name.rpartition("-")[2]) for path in tmp_path.glob("at-*")))


def test_workers_die_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "functions_of_test.py").write_text(FUNCTIONS)
    program = (
        f"import sys; sys.path[:] = {[str(tmp_path), *sys.path]!r}\n"
        "from pathlib import Path\n"
        "from niwaki.workers import distribute\n"
        f"orders = [['deaf', {str(tmp_path / 'at')!r}]] * 2\n"
        f"distribute('functions_of_test:make', orders, 2, lambda event: None, log=Path({str(tmp_path / 'log')!r}))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    until(lambda: len(list(tmp_path.glob("at-*"))) == 2)
    pids = [path.name.rpartition("-")[2] for path in tmp_path.glob("at-*")]
    assert all(alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    until(lambda: not any(alive(pid) for pid in pids))
