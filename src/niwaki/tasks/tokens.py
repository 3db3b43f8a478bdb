"""Text as numbers: what a tokenizer is, and tasks that can be read with another one than their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from niwaki.errors import InputError
from niwaki.tasks.files import read_bytes
from niwaki.tasks.protocol import Data, Metric, Task


class Tokenizer(Protocol):
    """Turns texts into token numbers."""

    @property
    def size(self) -> int:
        """How many tokens it knows: numbers are from 0 to ``size - 1``."""
        ...

    @property
    def padding(self) -> int:
        """The number that fills up the end of a sentence."""
        ...

    def __call__(self, texts: Sequence[str], length: int | None) -> Sequence[Sequence[int]]:
        """Return the tokens of every text.

        With a ``length`` every text is one sentence: at most so many tokens, special ones included, the rest cut off. With None it is
        running text: all of its tokens, and nothing added.
        """
        ...


@dataclass(frozen=True)
class TextTask(Task):
    """A task on text. It can be read with another tokenizer, which is what a pretrained model needs.

    Attributes:
        kind: ``language_model`` (the target of every token is the next one) or ``classification`` (of whole sentences, filled up at
            their end with the padding token).
        read: loads the examples, given the folder, a tokenizer (None for the task's own) and how many tokens an example may have
            (None for no limit); ``data`` is this with None for both. The facts of what it returns hold ``vocabulary`` (the tokenizer's
            size), ``padding`` (None where nothing is filled up) and ``length`` (tokens of an example).
        token_metrics: the metrics when tokens are not the task's own ones; None when they are the same.
    """

    kind: Literal["language_model", "classification"] = field(kw_only=True)
    read: Callable[[Path | None, Tokenizer | None, int | None], Data] = field(kw_only=True)
    token_metrics: Mapping[str, Metric] | None = field(default=None, kw_only=True)


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 text file, line ends as they are.

    Raises:
        InputError: it cannot be read, is empty, or is not UTF-8.
    """
    content = read_bytes(path)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line}: not UTF-8 text: the byte {content[error.start]:#04x} ({error.reason})") from None
    if not text:
        raise InputError(f"{path}: the file is empty; UTF-8 text is expected")
    return text
