import time

import pytest
import torch

from niwaki.errors import InputError
from niwaki.metrics.latency import interleaved


def test_calls_take_turns_and_each_is_charged_its_own_time(monkeypatch):
    clock = 0.0
    order = []
    monkeypatch.setattr(time, "perf_counter", lambda: clock)

    def call(name, seconds):
        def run():
            nonlocal clock
            clock += seconds
            order.append(name)

        return run

    times = interleaved({"a": call("a", 1.0), "b": call("b", 2.0), "c": call("c", 4.0)}, rounds=4, warmup=2)
    assert times == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [4.0] * 4}
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds[2:] == ["abc", "bca", "cab", "abc"]  # after two rounds of warming up
    assert [sorted(one) for one in rounds] == [["a", "b", "c"]] * 6


def test_the_number_of_threads_stays():
    threads = torch.get_num_threads()
    seen = []
    interleaved({"a": lambda: seen.append(torch.get_num_threads())}, rounds=2, warmup=0)
    assert seen == [threads] * 2
    assert torch.get_num_threads() == threads


def test_nothing_to_time():
    assert interleaved({}, rounds=3) == {}


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 1), (1, -1)])
def test_bad_input_is_said(rounds, warmup):
    with pytest.raises(InputError, match="at least 1 round"):
        interleaved({"a": int}, rounds=rounds, warmup=warmup)
