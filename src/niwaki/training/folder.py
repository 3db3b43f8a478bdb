"""The folder of a run: what may be written where, checked before anything is."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from niwaki.errors import InputError
from niwaki.training.record import FILE, MODEL_FILE, Choices, Record, read, write


def finished_before(folder: Path, choices: Choices) -> Record | None:
    """Return the record when the folder holds just this run, finished; None when the run may be written there.

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
    """Make the folder and write the unfinished record into it; when the block fails, take away what it and the block have written.

    Raises:
        InputError: the folder or the file in it cannot be written, or another process writes there.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"--out: {folder} cannot be written ({error.strerror}); give a folder that can") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"--out: {folder} is being written by another niwaki run; wait for it, or give another folder") from None
        if finished_before(folder, record.choices) is not None:
            raise InputError(f"--out: {folder} was finished by another niwaki run meanwhile; run the same again to see its result")
        yield from _written(folder, record, created)
    finally:
        os.close(lock)


def _written(folder: Path, record: Record, created: list[Path]) -> Iterator[None]:
    try:
        try:
            write(record, folder)
        except OSError as error:
            raise InputError(f"--out: {folder} cannot be written ({error.strerror}); give a folder that can") from None
        yield
    except BaseException:
        for name in (FILE, MODEL_FILE):
            (folder / name).unlink(missing_ok=True)
        for path in created:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


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
    """Return whether a file is what a killed process left of writing ``run.json``."""
    return name.startswith(f".{FILE}.") and name.endswith(".part")


def _difference(old: Choices, new: Choices) -> str:
    """Say what one choice differs in, for people."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for field, value in before.items():
        if isinstance(value, dict):
            inner = [key for key in [*value, *after[field]] if value.get(key) != after[field].get(key)]
            if inner:
                return f"{field}.{inner[0]} {value.get(inner[0])!r} there, {after[field].get(inner[0])!r} here"
        elif value != after[field]:
            return f"{field} {value!r} there, {after[field]!r} here"
    return "of another schema"
