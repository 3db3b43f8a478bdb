"""The two kinds of failure, and the wording that both share."""

import difflib
from collections.abc import Iterable


class NiwakiError(Exception):
    """Something ran and failed; the command line exits with 1.

    Attributes:
        details: the traceback of a user's own code, where that raised the error; it ends with a line break.
    """

    details = ""

    def told_as(self, message: str) -> "NiwakiError":
        """Return the error of a run with another message, and these details."""
        error = NiwakiError(message)
        error.details = self.details
        return error


class InputError(NiwakiError, ValueError):
    """The input is wrong. The message is one line: what, where, what would be right. The command line exits with 2."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return the tail of an error message that names the nearest choice and all choices.

    >>> did_you_mean("rigel", ["rigl", "set"])
    "did you mean 'rigl'? choices: rigl, set"
    """
    known = sorted(choices)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}choices: {', '.join(known)}"
