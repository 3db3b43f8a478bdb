"""Checkpoints: nested states come back as they were, damaged files are told, and a failed write leaves the old file."""

import errno
import math
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from niwaki.errors import InputError, NiwakiError
from niwaki.formats import files
from niwaki.training import checkpoint

STATE = {
    "numbers": {0: 1, -3: 2.5, "0": 2**70, 1.5: -0.0, None: None, True: False},
    "special": [math.inf, -math.inf, math.nan, 5e-324, 0.1 + 0.2],
    "text": ["", "ü 庭木 \u0000 \ud83c\udf33".encode("utf-16", "surrogatepass").decode("utf-16"), 'quote " and \\ and \n'],
    "tuples": ((), (1,), [(2, [3])], {"inner": ((4, 5), {})}),
    "tensors": {
        "bfloat16": torch.tensor([1.5, -2.0, float("nan")], dtype=torch.bfloat16),
        "float16": torch.tensor([[6e-8, 65504.0]], dtype=torch.float16),
        "float64": torch.tensor([0.1, -0.0, float("inf")], dtype=torch.float64),
        "bool": torch.tensor([[True, False], [False, True]]),
        "uint8": torch.arange(7, dtype=torch.uint8),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0, 3),
        "strided": torch.arange(12.0).reshape(3, 4).t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    },
}


def assert_same(found, expected):
    """Equal values of equal kinds, to the bit."""
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert files.raw_bytes(found.contiguous()) == files.raw_bytes(expected.detach().contiguous())
    elif isinstance(expected, dict):
        assert type(found) is dict
        assert [(type(key), key) for key in found] == [(type(key), key) for key in expected]
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert type(found) is float
        assert math.isnan(found) if math.isnan(expected) else struct.pack("d", found) == struct.pack("d", expected)
    else:
        assert type(found) is type(expected)
        assert found == expected


def test_a_nested_state_comes_back_as_it_was(tmp_path):
    checkpoint.save(tmp_path / "c", STATE)
    assert_same(checkpoint.load(tmp_path / "c"), STATE)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
KEYS = st.text() | st.integers()


@settings(max_examples=50)
@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner), max_leaves=20))
def test_any_state_comes_back_as_it_was(tmp_path_factory, state):
    path = tmp_path_factory.getbasetemp() / "any"
    checkpoint.save(path, state)
    assert_same(checkpoint.load(path), state)


def test_an_optimizers_state_comes_back(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path / "c", optimizer.state_dict())
    assert_same(checkpoint.load(tmp_path / "c"), optimizer.state_dict())


def test_what_comes_back_is_memory_of_its_own(tmp_path):
    checkpoint.save(tmp_path / "c", {"a": torch.zeros(3)})
    loaded = checkpoint.load(tmp_path / "c")
    checkpoint.save(tmp_path / "c", {"a": torch.ones(3)})
    loaded["a"].add_(5)
    assert loaded["a"].tolist() == [5, 5, 5]
    assert checkpoint.load(tmp_path / "c")["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("value", [{1, 2}, object(), 1j, b"bytes", torch.dtype])
def test_what_a_checkpoint_cannot_hold_is_refused(tmp_path, value):
    with pytest.raises(TypeError, match="a checkpoint cannot hold"):
        checkpoint.save(tmp_path / "c", {"inner": [value]})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- damage


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"none: cannot be read: No such file"):
        checkpoint.load(tmp_path / "none")


def test_every_truncation_is_an_input_error_that_names_the_file(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, {"a": torch.arange(5), "b": [1, "two"]})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"checkpoint\.safetensors: ") as error:
            checkpoint.load(path)
        assert "\n" not in str(error.value)


def test_a_file_of_another_kind_is_an_input_error(tmp_path):
    path = tmp_path / "model.safetensors"
    files.write(path, {"a": torch.zeros(2)}, {})
    with pytest.raises(InputError, match=r"model\.safetensors: not a checkpoint of this version \(niwaki\.checkpoint/1\)"):
        checkpoint.load(path)
    files.write(path, {}, {"checkpoint": "niwaki.checkpoint/99", "state": "1"})
    with pytest.raises(InputError, match="not a checkpoint of this version"):
        checkpoint.load(path)
    path.write_text("once upon a time there was a very long text" * 10)
    with pytest.raises(InputError, match=r"model\.safetensors: not a valid safetensors file"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "state",
    [
        *(None, "", "{", "{}", '{"tensor":"7"}', '{"tensor":"0","list":[]}', '{"dict":[[1]]}', '{"dict":1}', '{"set":[1]}', '{"list":5}'),
        *('{"dict":[[{"list":[]},1]]}', '{"list":[' * 5000),
    ],
)
def test_a_damaged_state_is_an_input_error(tmp_path, state):
    metadata = {"checkpoint": checkpoint.VERSION} | ({} if state is None else {"state": state})
    files.write(tmp_path / "c", {"0": torch.zeros(1)}, metadata)
    with pytest.raises(InputError, match=r"/c: a damaged checkpoint; delete it to begin anew") as error:
        checkpoint.load(tmp_path / "c")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- failed writes


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "c", {"step": 1})

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NiwakiError, match="cannot be written: No space left on device"):
        checkpoint.save(tmp_path / "c", {"step": 2})
    assert checkpoint.load(tmp_path / "c") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_folder_that_is_gone_is_told(tmp_path):
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        checkpoint.save(tmp_path / "gone" / "c", {"step": 2})
