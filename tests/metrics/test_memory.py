import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from niwaki.errors import InputError
from niwaki.metrics.memory import peak_bytes, peak_resident_bytes


def test_tensors_that_live_together_add_up():
    def work():
        a = torch.zeros(1000)  # 4000
        b = torch.zeros(500, dtype=torch.float64)  # 8000
        del a
        c = torch.zeros(2000, dtype=torch.int8)  # 6000
        return b, c

    assert peak_bytes(work) == 8000


def test_views_inplace_operations_and_what_was_there_need_nothing():
    x = torch.ones(100, 10)
    weight = torch.ones(10, 10)

    def work():
        y = x.t()[2:].reshape(-1, 2)[:4]  # views, except for the reshape of what is not contiguous: 800 numbers
        y.add_(1)
        weight.mul_(2)
        return y

    assert peak_bytes(work) == 3200
    assert peak_bytes(lambda: x.view(-1)) == 0
    assert peak_bytes(lambda: None) == 0


def test_a_forward_pass_keeps_two_neighbours_and_a_training_pass_all():
    widths = (50, 400, 300, 20)
    layers = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    x = torch.ones(8, 50)
    with torch.no_grad():
        assert peak_bytes(lambda: layers(x)) == 4 * 8 * (400 + 300)
    assert peak_bytes(lambda: layers(x)) == 4 * 8 * (400 + 300 + 20)  # kept for the gradient


def test_an_old_tensor_that_is_freed_is_no_gain():
    old = [torch.ones(1000)]

    def work():
        old.clear()
        return torch.zeros(500)

    assert peak_bytes(work) == 2000


def test_many_short_lives_are_one():
    def work():
        for _ in range(200):
            torch.zeros(100).add(1)  # two of 400 bytes

    assert peak_bytes(work) == 800


def test_an_error_inside_comes_through():
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0)
    assert peak_bytes(lambda: torch.zeros(10)) == 40  # nothing is left switched on


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_tells_what_its_allocator_handed_out():
    x = torch.ones(2**20, device="cuda")
    assert 2 * x.nbytes <= peak_bytes(lambda: (x + 1) * 2, "cuda") <= 2 * x.nbytes + 2**21
    assert peak_bytes(lambda: x.mul_(1), "cuda") == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_resident_memory_is_what_the_system_says():
    block = torch.ones(10_000_000)
    block.add_(1)
    peak = peak_resident_bytes()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert peak >= block.nbytes
    assert peak == pytest.approx(1024 * int(lines["VmHWM"].split()[0]), rel=0.02)
    assert peak <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_system_that_does_not_tell_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(InputError, match="does not tell"):
        peak_resident_bytes()
