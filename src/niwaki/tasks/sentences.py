"""Classification of sentences: SST-2 (Socher et al. 2013, as the GLUE benchmark distributes it), and files of the same form.

The files are ``train.tsv`` and ``dev.tsv``: UTF-8, a header that names the columns ``sentence`` and ``label`` (others are skipped),
then one example a line, columns separated by tabs, without quoting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from niwaki.errors import InputError
from niwaki.tasks.classification import METRICS
from niwaki.tasks.files import required
from niwaki.tasks.protocol import Data, Model, Training
from niwaki.tasks.text_networks import Encoder
from niwaki.tasks.tokens import TextTask, Tokenizer, read_text

LONGEST = 128
"""Tokens of a sentence at most; what a longer one has beyond them is cut off."""

SPECIAL = ("<pad>", "<unknown>")
"""The first words of a :class:`Words` vocabulary."""


@dataclass(frozen=True)
class Words:
    """A tokenizer whose tokens are lower-case words between white space; unknown ones are all number 1.

    >>> words = Words.of(["a bear and a bear", "a cub"])
    >>> words.vocabulary
    ('<pad>', '<unknown>', 'a', 'bear')
    >>> words(["A cub , a bear"], length=4)
    [[2, 1, 1, 2]]
    """

    vocabulary: tuple[str, ...]

    padding = 0

    @classmethod
    def of(cls, texts: Sequence[str]) -> Words:
        """Return the tokenizer of all words that the texts have at least twice, the most frequent first, equally frequent by name."""
        counts = Counter(word for text in texts for word in text.lower().split() if word not in SPECIAL)
        frequent = sorted((word for word, count in counts.items() if count > 1), key=lambda word: (-counts[word], word))
        return cls((*SPECIAL, *frequent))

    @property
    def size(self) -> int:
        """How many words there are, the two special ones included."""
        return len(self.vocabulary)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.vocabulary) if word not in SPECIAL}

    def __call__(self, texts: Sequence[str], length: int | None = None) -> list[list[int]]:
        """Return the numbers of the words of every text, of the first ``length`` if that is given."""
        return [[self._numbers.get(word, 1) for word in text.lower().split()[:length]] for text in texts]


def read_tsv(path: Path) -> list[tuple[str, int, int]]:
    """Read a file of sentences: the sentence, its label, and the line that it is on (the header is line 1).

    Raises:
        InputError: it cannot be read, has no column ``sentence`` or ``label`` or no example, or a line has another number of columns,
            an empty sentence, or a label that is not a whole number from 0 on.
    """
    lines = [line.removesuffix("\r") for line in read_text(path).removeprefix("\ufeff").removesuffix("\n").split("\n")]
    columns = lines[0].split("\t")
    for column in ("sentence", "label"):
        if columns.count(column) != 1:
            found = ", ".join(map(repr, columns))[:80]
            raise InputError(f"{path}: line 1: expected a header with the columns sentence and label, separated by a tab; found {found}")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        values = line.split("\t")
        if len(values) != len(columns):
            raise InputError(f"{path}: line {number}: expected {len(columns)} columns, as line 1 names them; found {len(values)}")
        sentence, label = values[columns.index("sentence")], values[columns.index("label")]
        if not sentence.strip():
            raise InputError(f"{path}: line {number}: the sentence is empty")
        if not (label.isascii() and label.isdigit()):
            raise InputError(f"{path}: line {number}: the label is {label[:20]!r}; expected a whole number from 0 on")
        rows.append((sentence, int(label), number))
    if not rows:
        raise InputError(f"{path}: no example follows the header")
    return rows


def read(
    folder: Path | None,
    tokenizer: Tokenizer | None = None,
    longest: int | None = None,
    *,
    task: str,
    place: str = "",
    classes: tuple[str, ...] = (),
) -> Data:
    """Read ``train.tsv`` to train on and ``dev.tsv`` to test on: inputs int64 ``[N, length]``, labels int64 ``[N]``.

    Sentences are filled up at their end with the tokenizer's padding to the ``length`` of the longest one of ``train.tsv``, which is
    at most 128 tokens (or ``longest``); longer ones are cut.

    Args:
        folder: the one of ``--data``.
        tokenizer: by default :class:`Words` of the training sentences.
        longest: how many tokens a sentence may have.
        task: who asks, for messages.
        place: sub-folder where the files may be; otherwise they are in the folder itself.
        classes: names of the classes; when there are none, the classes are all labels of ``train.tsv``, each named by its number.

    Raises:
        InputError: a file is missing or not of the form, or a label is out of range or never trained on.
    """
    contents = "sentences and labels, separated by a tab"
    paths = [required(folder, str(Path(place) / name), task=task, contents=contents) for name in ("train.tsv", "dev.tsv")]
    train, test = (read_tsv(path) for path in paths)
    seen = {label for _, label, _ in train}
    count = len(classes) or max(2, max(seen) + 1)
    for path, rows in zip(paths, (train, test), strict=True):
        for _, label, line in rows:
            if label >= count:
                raise InputError(f"{path}: line {line}: the label is {label}; 0 to {count - 1} are possible")
    missing = next((label for label in range(count) if label not in seen), None)
    if missing is not None:
        raise InputError(f"{paths[0]}: no line has the label {missing}; every label from 0 to {count - 1} is needed")
    tokens: Tokenizer = Words.of([sentence for sentence, _, _ in train]) if tokenizer is None else tokenizer

    learned = tokens([sentence for sentence, _, _ in train], min(LONGEST, longest or LONGEST))
    length = max(map(len, learned))
    tested = tokens([sentence for sentence, _, _ in test], length)
    facts = {"vocabulary": tokens.size, "padding": tokens.padding, "length": length}

    def examples(numbers: Sequence[Sequence[int]], rows: Sequence[tuple[str, int, int]]) -> TensorDataset:
        return TensorDataset(padded(numbers, length, tokens.padding), torch.tensor([label for _, label, _ in rows]))

    return Data(examples(learned, train), examples(tested, test), classes=classes or tuple(map(str, range(count))), facts=facts)


def padded(rows: Sequence[Sequence[int]], length: int, padding: int) -> torch.Tensor:
    """Return rows of at most ``length`` numbers as a tensor ``[rows, length]``, filled up with ``padding`` at their ends.

    >>> padded([[5], [6, 7]], 2, padding=0)
    tensor([[5, 0],
            [6, 7]])
    """
    return torch.tensor([[*row, *[padding] * (length - len(row))] for row in rows])


def sentence_task(name: str, summary: str = "", *, place: str = "", classes: tuple[str, ...] = ()) -> TextTask:
    """Return the task of classifying the sentences of a ``train.tsv`` and a ``dev.tsv``; the arguments are those of :func:`read`."""
    load = partial(read, task=name, place=place, classes=classes)
    return TextTask(
        name=name,
        summary=summary,
        models={
            "encoder": Model(
                lambda data: Encoder(
                    data.facts["vocabulary"], data.facts["length"], len(data.classes), padding=data.facts["padding"], width=64
                ),
                Training(epochs=2, batch_size=64, optimizer="adamw", learning_rate=1e-3, weight_decay=0.01, clip_norm=1.0, warmup=0.1),
            )
        },
        data=load,
        read=load,
        loss=F.cross_entropy,
        metrics=METRICS,
        kind="classification",
    )


SST2 = sentence_task(
    "sst2",
    "SST-2: 67,349 phrases and sentences of film reviews to train on, 872 sentences to test on, negative or positive",
    place="sst2",
    classes=("negative", "positive"),
)

SENTENCES = sentence_task("sentences", "your own sentences: train.tsv and dev.tsv with the columns sentence and label (0, 1, ...)")
