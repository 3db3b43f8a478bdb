"""A store of tensors: everything comes back as it was, memory is kept, the disk is left clean."""

import pytest
import torch

from niwaki.oneshot.store import Store

TENSORS = [
    torch.randn(5, 3),
    torch.randn(7).to(torch.bfloat16),
    torch.tensor([[True, False]]),
    torch.arange(9).view(3, 3).T,
    torch.tensor(2.5, dtype=torch.float64),
    torch.zeros(0, 4),
    torch.ones(1, 1, 6).expand(2, 3, 6),
]


@pytest.mark.parametrize("budget", [None, 0, 70])
def test_everything_comes_back(budget):
    with Store(budget) as store:
        kept = [store.put(tensor) for tensor in TENSORS]
        assert budget is None or store.bytes_in_memory <= budget
        for handle, tensor in zip(kept, TENSORS, strict=True):
            found = store.get(handle)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
            found.zero_()  # is the caller's own
            assert torch.equal(store.get(handle), tensor)


def test_only_what_has_no_room_goes_to_disk():
    with Store(budget=100) as store:
        small, large = store.put(torch.zeros(20)), store.put(torch.ones(20))
        assert (small.file, store.bytes_in_memory, store.bytes_written) == (None, 80, 80)
        assert large.tensor is None
        store.replace(small, torch.zeros(1))
        store.replace(large, torch.ones(24))  # now there is room
        assert (large.file, store.bytes_in_memory) == (None, 100)
        assert torch.equal(store.get(large), torch.ones(24))


def test_equal_tensors_are_kept_once():
    with Store() as store:
        first = store.put_shared(torch.ones(10))
        assert store.put_shared(torch.ones(10)) is first
        assert store.put_shared(torch.ones(10, dtype=torch.float64)) is not first
        assert store.put_shared(torch.ones(2, 5)) is not first
        assert store.bytes_in_memory == 40 + 80 + 40


def _failing(files):
    with Store(0) as store:
        files.append(store.put(torch.ones(3)).file)
        assert files[0].is_file()
        raise RuntimeError


def test_nothing_is_left_on_disk():
    files = []
    with pytest.raises(RuntimeError):
        _failing(files)
    assert not files[0].parent.exists()


def test_what_is_dropped_makes_room():
    with Store(budget=8) as store:
        one = store.put(torch.zeros(2))
        two = store.put(torch.zeros(2))
        file = two.file
        assert file is not None
        store.drop(one)
        store.drop(two)
        assert store.bytes_in_memory == 0
        assert not file.exists()
