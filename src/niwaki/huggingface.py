"""Hugging Face ``transformers``, asked for files of the user: it is quiet, and what it complains of is one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from niwaki.errors import InputError


def transformers_for(where: str) -> Any:
    """Return the library.

    Args:
        where: what needs it, the beginning of the error.

    Raises:
        InputError: it is not installed.
    """
    try:
        import transformers

        transformers.AutoModel  # noqa: B018 - the library imports its parts, and what those need, when they are first asked for
    except ImportError as error:
        raise InputError(f"{where}: needs transformers ({_line(error)}); pip install 'niwaki[hf]'") from None
    return transformers


@contextmanager
def complaining(where: str, problem: str) -> Iterator[None]:
    """Turn whatever the library raises about the user's files inside the block into one InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{where}: {problem}: {type(error).__name__}: {_line(error)}") from error


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Keep the library's reports and progress bars off the screen; what it says only once it does not say later either."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
