"""The folder of a run: what may be written where, checked before anything is."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from niwaki.errors import InputError
from niwaki.training.record import FILE, Choices, Record, read, write
from niwaki.training.state import Interrupted

HASHES = {
    "task_code": "the code of the task file has changed",
    "data": "the examples differ: other files, or random ones without a seed",
    "start": "the weights of --from differ",
}
"""What it means that the hash of a choice is another one."""


def finished_before(folder: Path, choices: Choices) -> Record | None:
    """Return the record when the folder holds just this run, finished; None when the run may be written there.

    That is where nothing can be lost: the folder is new or empty, holds this run unfinished, or nothing but the ``run.json`` of another
    run that ended before its first checkpoint.

    Raises:
        InputError: the folder is no folder, cannot be written, holds something else or another run, or the run's files were changed.
    """
    try:
        if not folder.exists():
            _require_writable(next(parent for parent in folder.absolute().parents if parent.exists()), folder)
            return None
        is_folder = folder.is_dir()
    except OSError as error:
        raise InputError(f"--out: {str(folder)[:80]} cannot be used ({error.strerror}); give a folder that is new or empty") from None
    if not is_folder:
        raise InputError(f"--out: {folder} is a file; give a folder that is new or empty")
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError as error:
        raise InputError(f"--out: {folder} cannot be read ({error.strerror}); give a folder that is new or empty") from None
    if FILE not in names:
        if any(not _is_leftover(name) for name in names):
            raise InputError(f"--out: {folder} is not empty and holds no {FILE} of niwaki; give a folder that is new or empty")
        _require_writable(folder, folder)
        return None
    try:
        record = read(folder)
    except InputError as error:
        raise InputError(f"--out: {error}; give a folder that is new or empty") from None
    if record.identity != choices.identity():
        if record.results is None and all(name == FILE or _is_leftover(name) for name in names):
            _require_writable(folder, folder)
            return None
        raise InputError(f"--out: {folder} holds another run ({_difference(record.choices, choices)}); give a folder that is new or empty")
    if record.results is None:
        _require_writable(folder, folder)
        return None
    stored = record.results.model
    path = folder / stored.file
    if not path.is_file() or path.stat().st_size != stored.bytes or sha256(path) != stored.sha256:
        raise InputError(f"--out: {path} is missing or was changed since its run; give a folder that is new or empty")
    return record


@contextmanager
def opened(folder: Path, record: Record) -> Iterator[None]:
    """Make the folder, lock it, and write the unfinished record into it; what a killed process left half-written is taken away.

    Raises:
        InputError: the folder or the file in it cannot be written, or another process writes there.
    """
    with locked(folder, "--out: {folder} is being written by another niwaki run; wait for it, or give another folder"):
        if finished_before(folder, record.choices) is not None:
            raise InputError(f"--out: {folder} was finished by another niwaki run meanwhile; run the same again to see its result")
        if not (folder / FILE).exists() or read(folder).identity != record.identity:
            write(record, folder)
        yield


@contextmanager
def locked(folder: Path, busy: str | None = None, stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Make a folder and keep other processes out of it until the block ends; temporary files of killed writers are deleted.

    Args:
        folder: is made with its parents.
        busy: the error when another process has it; None to wait for that process.
        stop: asked while waiting; when it says so, Interrupted is raised.

    Raises:
        InputError: it cannot be made, or is busy.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"--out: {folder} cannot be written ({error.strerror}); give a folder that can") from None
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if busy is not None:
                    raise InputError(busy.format(folder=folder)) from None
                if stop():
                    raise Interrupted("interrupted while another process trains the same dense baseline") from None
                time.sleep(0.2)
        for path in folder.iterdir():
            if _is_leftover(path.name):
                path.unlink(missing_ok=True)
        yield
    finally:
        os.close(lock)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_writable(existing: Path, folder: Path) -> None:
    if not existing.is_dir():
        raise InputError(f"--out: {folder} cannot be made, as {existing} is a file; give a folder that is new or empty")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--out: {folder} cannot be written (no permission in {existing}); give a folder that can")


def _is_leftover(name: str) -> bool:
    """Return whether a file is what a killed process left of writing one."""
    return re.fullmatch(r"\.[0-9a-f]{16}\.tmp", name) is not None


def _difference(old: Choices, new: Choices) -> str:
    """Say what one choice differs in, for people."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for field, value in before.items():
        other = after[field]
        if field == "start" and None not in (value, other):  # the name of the file does not matter
            value, other = value["sha256"], other["sha256"]
        if value == other or (field == "method" and old.recipe == new.recipe):
            continue
        if field in HASHES and None not in (value, other):
            return HASHES[field]
        if field == "start":
            value, other = (start and start["file"] for start in (value, other))
        if isinstance(value, dict) and isinstance(other, dict):
            inner = next(key for key in [*value, *other] if value.get(key) != other.get(key))
            return f"{field}.{inner} {value.get(inner)!r} there, {other.get(inner)!r} here"
        return f"{field} {value!r} there, {other!r} here"
    return "of another schema"
