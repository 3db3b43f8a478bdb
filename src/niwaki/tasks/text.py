"""Language modelling by characters: guess the next character of a text, at every position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from niwaki.errors import InputError
from niwaki.tasks.networks import Transformer
from niwaki.tasks.protocol import Data, Metric, Model, Training
from niwaki.tasks.tokens import TextTask, Tokenizer, read_text

CONTEXT = 128
"""Tokens of an example: from so many the next ones are guessed."""

USUAL = "text/tinyshakespeare.txt"
"""The file that is taken from a data folder that has it."""


@dataclass(frozen=True)
class Characters:
    """A tokenizer whose tokens are the characters (Unicode code points) of an alphabet, numbered in its order.

    >>> Characters.of("abba")(["ba"], None)
    [[1, 0]]
    """

    alphabet: str

    padding = 0

    @classmethod
    def of(cls, text: str) -> Characters:
        """Return the tokenizer of all characters of a text, sorted by code point."""
        return cls("".join(sorted(set(text))))

    @property
    def size(self) -> int:
        """How many characters there are."""
        return len(self.alphabet)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {character: number for number, character in enumerate(self.alphabet)}

    def __call__(self, texts: Sequence[str], length: int | None = None) -> list[list[int]]:
        """Return the numbers of the characters of every text, of the first ``length`` if that is given."""
        return [[self._numbers[character] for character in text[:length]] for text in texts]


def find(path: Path | None) -> Path:
    """Return the text file that is meant: the path itself, or a file in the folder that it is.

    In a folder it is ``text/tinyshakespeare.txt``, else ``tinyshakespeare.txt``, else the only ``*.txt`` that is there.

    Raises:
        InputError: no path was given, nothing is there, or the folder has no text file or several.
    """
    if path is None:
        raise InputError("task 'characters': no text was given; --data or NIWAKI_DATA names a text file, or a folder with one")
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"task 'characters': {path}: there is no such file or folder; --data or NIWAKI_DATA names one with text")
    for usual in (path / USUAL, path / Path(USUAL).name):
        if usual.is_file():
            return usual
    found = sorted(file for file in path.glob("*.txt") if file.is_file())
    if len(found) != 1:
        names = ", ".join(file.name for file in found)
        problem = f"several text files ({names[:200]})" if found else f"neither {USUAL} nor another *.txt file"
        raise InputError(f"task 'characters': {path}: has {problem}; name the one to read, as in --data {path / 'FILE.txt'}")
    return found[0]


def read(path: Path | None, tokenizer: Tokenizer | None = None, longest: int | None = None) -> Data:
    """Read a text as windows of tokens: inputs and targets int64 ``[N, length]``, targets being the inputs' next tokens.

    The first 90 % of the characters (rounded down) are to train on, the rest to test on. Windows do not overlap: one starts every
    ``length`` tokens, and what is left at the end of either part, less than a window and its last target, is not used.

    Args:
        path: a text file, or a folder with one (:func:`find`).
        tokenizer: by default :class:`Characters` of the whole text.
        longest: how many tokens a window may have; ``length`` is 128, or this if it is less.

    Raises:
        InputError: there is no text file, it is empty or not UTF-8, or too short for a window in each part.
    """
    file = find(path)
    text = read_text(file)
    tokens: Tokenizer = Characters.of(text) if tokenizer is None else tokenizer
    length = min(CONTEXT, longest or CONTEXT)
    split = len(text) * 9 // 10
    parts = tokens([text[:split], text[split:]], None)
    for part, name, share in zip(parts, ("train", "test"), ("first 90 %", "last 10 %"), strict=True):
        if len(part) <= length:
            needed = f"{length + 1} tokens to {name} on are needed"
            raise InputError(f"{file}: too short: {needed}, and the {share} of its {len(text):,} characters make {len(part)}")
    facts: dict[str, Any] = {"vocabulary": tokens.size, "padding": None, "length": length}
    if isinstance(tokens, Characters):
        facts["characters"] = tokens.alphabet
    train, test = (windows(torch.tensor(part), length) for part in parts)
    return Data(train, test, facts=facts, tokens_per_example=length)


def windows(tokens: Tensor, length: int) -> TensorDataset:
    """Cut tokens ``[n]`` into ``(n - 1) // length`` windows: inputs ``[N, length]``, and as targets the tokens that follow each.

    >>> windows(torch.arange(8), 3).tensors
    (tensor([[0, 1, 2], [3, 4, 5]]), tensor([[1, 2, 3], [4, 5, 6]]))
    """
    used = (len(tokens) - 1) // length * length
    return TensorDataset(tokens[:used].view(-1, length), tokens[1 : used + 1].view(-1, length))


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over all positions, in nats.

    Args:
        outputs: scores, shape ``[batch, length, vocabulary]``.
        targets: token numbers, shape ``[batch, length]``.
    """
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def example_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over the positions of every example, in nats: shape ``[batch]``."""
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(dim=1)


def example_bits(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over the positions of every example, in bits: shape ``[batch]``."""
    return example_cross_entropy(outputs, targets) / math.log(2)


def example_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the share of every example's positions whose largest score is that of the next token: shape ``[batch]``."""
    return (outputs.argmax(dim=-1) == targets).double().mean(dim=1)


def metrics(token: str) -> dict[str, Metric]:
    """Return the metrics of a language model, the loss first; ``token`` is what its tokens are called."""
    return {
        "loss": Metric(example_cross_entropy, f"mean cross-entropy of the next {token}, in nats", higher_is_better=False, percent=False),
        "accuracy": Metric(example_accuracy, f"share of next {token}s that are the one with the largest output"),
        f"bits_per_{token}": Metric(
            example_bits, f"mean cross-entropy of the next {token}, in bits: loss / ln 2", higher_is_better=False, percent=False
        ),
    }


CHARACTERS = TextTask(
    name="characters",
    summary="the next character of a text: any UTF-8 text file, cut into windows of 128 characters; the last 10 % are to test on",
    models={
        "transformer": Model(
            lambda data: Transformer(data.facts["vocabulary"], data.facts["length"], width=128, layers=4, heads=4),
            Training(epochs=6, batch_size=16, optimizer="adamw", learning_rate=2e-3, weight_decay=0.1, clip_norm=1.0, warmup=0.05),
        )
    },
    data=read,
    read=read,
    loss=cross_entropy,
    metrics=metrics("character"),
    token_metrics=metrics("token"),
    kind="language_model",
)
