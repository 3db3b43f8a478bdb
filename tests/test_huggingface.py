"""Asking the library transformers: quietly, and with complaints of one line."""

import sys
from types import SimpleNamespace

import pytest

from niwaki.errors import InputError
from niwaki.huggingface import complaining, quiet, transformers_for


class Logging:
    """The library's settings, as far as they are touched."""

    def __init__(self, bars: bool) -> None:
        self.level, self.bars = 20, bars

    def get_verbosity(self) -> int:
        return self.level

    def set_verbosity(self, level: int) -> None:
        self.level = level

    def set_verbosity_error(self) -> None:
        self.level = 40

    def is_progress_bar_enabled(self) -> bool:
        return self.bars

    def enable_progress_bar(self) -> None:
        self.bars = True

    def disable_progress_bar(self) -> None:
        self.bars = False


def test_where_the_library_is_missing_it_says_who_needs_it_and_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"^--model hf:x: needs transformers \(.*\); pip install 'niwaki\[hf\]'$"):
        transformers_for("--model hf:x")


@pytest.mark.parametrize("bars", [True, False])
def test_settings_are_given_back_after_an_error_too(bars):
    logging, seen = Logging(bars), []

    def fail() -> None:
        seen.append((logging.level, logging.bars))
        raise KeyError

    with pytest.raises(KeyError), quiet(SimpleNamespace(utils=SimpleNamespace(logging=logging))):
        fail()
    assert seen == [(40, False)]
    assert (logging.level, logging.bars) == (20, bars)


def test_complaints_are_one_line():
    with pytest.raises(InputError, match=r"^folder: it cannot be read: OSError: two lines$"), complaining("folder", "it cannot be read"):
        raise OSError("two\n   lines")
    with pytest.raises(InputError) as raised, complaining("folder", "it cannot be read"):
        raise ValueError("x" * 1000)
    assert len(str(raised.value)) < 400
    with pytest.raises(InputError, match=r"^mine$"), complaining("folder", "it cannot be read"):
        raise InputError("mine")
