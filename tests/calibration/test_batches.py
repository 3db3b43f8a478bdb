"""Batches of any structure, cut into examples and put together again."""

from collections import OrderedDict, namedtuple

import pytest
import torch

from niwaki.calibration import Arguments, Replay, examples
from niwaki.calibration.batches import Examples, class_dimension, count, in_float64, leaves, logits_of, replaced, with_logits
from niwaki.errors import InputError

Pair = namedtuple("Pair", "left right")


def structure():
    """Five examples, and what belongs to all of them."""
    x = torch.arange(10).view(5, 2)
    whole = torch.zeros(1, 2)
    return Arguments((x, [x + 10, None]), {"pair": Pair(x[:, 0], torch.tensor(3)), "more": OrderedDict(mask=whole, flag=True)})


def test_examples_are_cut_out_of_any_structure():
    targets = {"labels": torch.arange(5)}
    found = list(examples([(structure(), targets)], 2))
    assert [len(y["labels"]) for _, y in found] == [2, 2, 1]
    inputs, _ = found[1]
    assert isinstance(inputs, Arguments)
    assert inputs.args[0].tolist() == [[4, 5], [6, 7]]
    assert inputs.args[1][0].tolist() == [[14, 15], [16, 17]]
    assert inputs.args[1][1] is None
    assert isinstance(inputs.kwargs["pair"], Pair)
    assert inputs.kwargs["pair"].left.tolist() == [4, 6]
    assert inputs.kwargs["pair"].right == 3
    assert inputs.kwargs["more"]["mask"].shape == (1, 2)
    assert inputs.kwargs["more"]["flag"] is True
    assert [x.tolist() for x, _ in examples([(torch.arange(2), None), (torch.arange(1), None)])] == [[0], [1], [0]]
    with pytest.raises(InputError, match="first dimension of examples, got str"):
        list(examples([("text", None)]))


def test_parts_make_the_whole():
    batch = Examples.of(structure(), torch.arange(5))
    together = batch.part(0, 2).and_then(batch.part(2, 5))
    assert together.size == 5
    for a, b in zip(leaves(together.value), leaves((structure(), torch.arange(5))), strict=True):
        assert torch.equal(a, b)
    other = Examples.of(replaced(structure(), [tensor + 1 for tensor in leaves(structure())]), torch.arange(5))
    with pytest.raises(InputError, match="would join batches of different shapes"):
        batch.and_then(other)  # what belongs to all examples differs


def test_what_a_model_answers():
    class Output:
        logits = torch.ones(2, 3)

    output = Output()
    assert torch.equal(logits_of(output), output.logits)
    assert with_logits(output, torch.zeros(1)).logits.tolist() == [0]
    assert output.logits.sum() == 6
    with pytest.raises(InputError, match="must be a tensor or have logits for this statistic, got dict"):
        logits_of({"logits": torch.ones(1)})
    assert [class_dimension(torch.zeros(shape)) for shape in [(2, 3), (2, 5, 3), (2, 3, 5, 5)]] == [1, 2, 1]


def test_precision_and_counts():
    found = in_float64((torch.ones(2), [torch.ones(3, dtype=torch.int64)], {"h": torch.ones(1, dtype=torch.float16)}))
    assert [tensor.dtype for tensor in leaves(found)] == [torch.float64, torch.int64, torch.float64]
    assert count((torch.tensor(1.0), torch.ones(4, 2))) == 4
    assert count("nothing") == 1


def test_replay_reads_no_further_than_asked():
    rest = iter(range(5))
    again = Replay(rest)
    first = iter(again)
    assert [next(first), next(first)] == [0, 1]
    assert next(rest) == 2
    assert list(again) == [0, 1, 3, 4]
    assert list(first) == [3, 4]
