import gzip
import math
import random

import numpy as np
import pytest
import torch

from niwaki.errors import InputError
from niwaki.metrics import forward_flops
from niwaki.target import Weights, select_targets
from niwaki.tasks import text
from niwaki.tasks.text import CHARACTERS


def _sample(characters=3000, alphabet="ab c\né猫🌲", seed=0):
    return "".join(random.Random(seed).choices(alphabet, k=characters))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text(_sample(), encoding="utf-8")
    return path


def _decoded(tokens, alphabet):
    return ["".join(alphabet[token] for token in row) for row in tokens.tolist()]


def test_windows_do_not_overlap_and_targets_are_the_next_characters(file):
    data = CHARACTERS.data(file)
    whole, alphabet = _sample(), data.facts["characters"]
    assert alphabet == "".join(sorted(set(whole)))
    for examples, part in ((data.train, whole[:2700]), (data.test, whole[2700:])):
        inputs, targets = examples[torch.arange(len(examples))]
        starts = [start for start in range(0, len(part), 128) if start + 129 <= len(part)]
        assert _decoded(inputs, alphabet) == [part[start : start + 128] for start in starts]
        assert _decoded(targets, alphabet) == [part[start + 1 : start + 129] for start in starts]
        assert inputs.dtype == targets.dtype == torch.int64
    assert (data.facts["vocabulary"], data.facts["length"], data.tokens_per_example, data.classes) == (8, 128, 128, ())


class _Halves:
    """A tokenizer of pairs of characters."""

    size, padding = 100, 7

    def __call__(self, texts, length):
        assert length is None
        return [[ord(part[i]) % 100 for i in range(0, len(part), 2)] for part in texts]


def test_tokens_may_be_others_and_windows_shorter(file):
    data = CHARACTERS.read(file, _Halves(), 10)
    expected = [ord(c) % 100 for c in _sample()[0:2700:2]]
    assert data.train.tensors[0].flatten().tolist() == expected[: len(data.train) * 10]
    assert len(data.train) == (1350 - 1) // 10
    assert data.facts == {"vocabulary": 100, "padding": None, "length": 10}


def test_equal_text_equal_fingerprint(file, tmp_path):
    other, packed = tmp_path / "other.txt", tmp_path / "packed.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    other.write_text(_sample(seed=1), encoding="utf-8")
    prints = [CHARACTERS.data(path).fingerprint() for path in (file, packed, other)]
    assert prints[0] == prints[1] != prints[2]


def test_which_file_of_a_folder_is_read(tmp_path):
    def refused(match):
        with pytest.raises(InputError, match=match) as error:
            text.find(tmp_path)
        assert "\n" not in str(error.value)

    refused("neither text/tinyshakespeare.txt nor another")
    (tmp_path / "notes.md").touch()
    refused("neither")
    (tmp_path / "b.txt").touch()
    assert text.find(tmp_path) == tmp_path / "b.txt"
    (tmp_path / "a.txt").touch()
    refused(r"several text files \(a.txt, b.txt\); name the one")
    (tmp_path / "tinyshakespeare.txt").touch()
    assert text.find(tmp_path) == tmp_path / "tinyshakespeare.txt"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tinyshakespeare.txt").touch()
    assert text.find(tmp_path) == tmp_path / "text" / "tinyshakespeare.txt"
    assert text.find(tmp_path / "a.txt") == tmp_path / "a.txt"


@pytest.mark.parametrize("path", [None, "nothing"])
def test_no_text_is_one_line_that_names_the_remedy(path, tmp_path):
    with pytest.raises(InputError, match="--data or NIWAKI_DATA") as error:
        CHARACTERS.data(None if path is None else tmp_path / path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "some.txt: the file is empty"),
        (b"one\ntwo\xff\n", "some.txt: line 2: not UTF-8 text: the byte 0xff"),
        (b"ab" * 300, "some.txt: too short: 129 tokens to test on are needed, and the last 10 % of its 600 characters make 60"),
        (b"ab" * 40, "some.txt: too short: 129 tokens to train on"),
    ],
)
def test_bad_text_names_the_file_and_what_was_expected(content, message, tmp_path):
    path = tmp_path / "some.txt"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        CHARACTERS.data(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_shortest_text_has_one_window_to_test_on(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("ab" * 645)  # 1290 characters, of which the last 129 are to test on
    assert len(CHARACTERS.data(path).test) == 1
    path.write_text("ab" * 640)
    with pytest.raises(InputError, match="too short"):
        CHARACTERS.data(path)


def test_loss_and_metrics_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(7, (3, 5), generator=generator)
    scores, right = outputs.numpy(), targets.numpy()
    nats = np.array([[-math.log(np.exp(scores[b, t, right[b, t]]) / np.exp(scores[b, t]).sum()) for t in range(5)] for b in range(3)])
    hits = np.array([[scores[b, t].argmax() == right[b, t] for t in range(5)] for b in range(3)])
    found = {name: metric.values(outputs, targets).numpy() for name, metric in CHARACTERS.metrics.items()}
    assert list(found) == ["loss", "accuracy", "bits_per_character"]
    np.testing.assert_allclose(found["loss"], nats.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found["accuracy"], hits.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found["bits_per_character"], nats.mean(1) / np.log(2), rtol=1e-12)
    assert CHARACTERS.loss(outputs, targets).item() == pytest.approx(nats.mean(), rel=1e-12)
    assert [metric.higher_is_better for metric in CHARACTERS.metrics.values()] == [False, True, False]


def test_the_model_fits_the_data_and_learns_a_text_that_repeats_itself(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("abcd" * 400)
    data = CHARACTERS.read(path, None, 16)
    model = CHARACTERS.build("transformer", data, seed=0)
    inputs, targets = data.train[torch.arange(4)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = CHARACTERS.loss(model(inputs), targets)
    assert first.item() == pytest.approx(math.log(4), rel=0.2)
    for _ in range(12):
        optimizer.zero_grad()
        CHARACTERS.loss(model(inputs), targets).backward()
        optimizer.step()
    outputs = model(data.test[torch.arange(1)][0])
    assert CHARACTERS.metrics["accuracy"].values(outputs, data.test[torch.arange(1)][1]).item() > 0.9
    chosen, _ = select_targets(model, Weights())
    assert {target.name.split(".")[-2] for target in chosen} == {"query", "key", "value", "out", "up", "down"}
    weights = 4 * 12 * 128 * 128 + 128 * 4  # of the four blocks and the output layer
    attention = 4 * 2 * 16 * 16 * 128  # multiply-adds of the products between activations
    assert forward_flops(model, CHARACTERS.example(data)).dense == 2 * (weights * 16 + attention)
