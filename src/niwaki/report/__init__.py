"""Reports: one self-contained HTML for a run, one for a comparison of runs, from their records alone.

A page needs no network and no other file. It is light or dark as the reader's system is, can be printed, and saves every table as CSV.
"""

from pathlib import Path

from niwaki.formats.files import replacing
from niwaki.report.comparison import comparison_report, occams_hill
from niwaki.report.run import run_report

__all__ = ["comparison_report", "occams_hill", "run_report", "write"]


def write(text: str, path: str | Path) -> None:
    """Write a report (or a drawing) into a file, whole or not at all.

    Raises:
        InputError: the folder does not exist or cannot be written, or the path is no regular file.
        NiwakiError: no room, or the device failed.
    """
    with replacing(path) as file:
        file.write(text.encode())
