"""A user's own task: ``path/to/file.py:object``."""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from niwaki.errors import InputError, NiwakiError, did_you_mean
from niwaki.tasks.protocol import Task


class TaskFileError(InputError):
    """A user's task file, or its function, raised an error.

    Attributes:
        details: the traceback of that error, with the frames of the user's code and of what it called alone; it ends with a line break.
    """

    def __init__(self, message: str, details: str) -> None:
        super().__init__(message)
        self.details = details


def load(spec: str) -> Task:
    """Return the task that a Python file defines, with the hash of its code.

    ``file.py:object`` names a :class:`Task`, or a function without arguments that returns one; ``file.py`` alone is enough when the
    file has exactly one Task. While it is loaded, modules that stand beside it can be imported. ``Task.code`` is the SHA-256 of the
    file, of those modules that it imports, and of the object's name.

    Raises:
        InputError: there is no such file or object, or the object is no task.
        TaskFileError: the file or the function raised an error.
    """
    place, _, name = (spec, "", "") if spec.endswith(".py") else spec.rpartition(":")
    path = Path(place)
    content = _content(path, spec)
    with _importable(path.parent), reported(spec, "cannot be imported"):
        module = _run(path, content)
    name = name or _only(module, spec)
    found = _named(module, name, spec)
    if not isinstance(found, Task):
        if not _can_be_called(found):
            expected = "expected a niwaki Task, or a function without arguments that returns one"
            raise InputError(f"--task {spec}: {name!r} is {_kind(found)}; {expected}")
        with _importable(path.parent), reported(spec, "failed"):
            found = found()
    if not isinstance(found, Task):
        raise InputError(f"--task {spec}: {name!r} returned {_kind(found)}; expected a niwaki Task")
    return _guarded(replace(found, code=hashlib.sha256(f"{_hash(path, content)}:{name}".encode()).hexdigest()), spec)


def _guarded(task: Task, spec: str) -> Task:
    """Return the task with functions whose errors are told as those of the user's own code."""

    def guard(function: Any, what: str) -> Any:
        if function is None:
            return None

        @wraps(function)
        def call(*arguments: Any) -> Any:
            with reported(spec, f"{what} failed"):
                return function(*arguments)

        return call

    return replace(
        task,
        models={key: replace(model, build=guard(model.build, f"building the model {key!r}")) for key, model in task.models.items()},
        data=guard(task.data, "data"),
        loss=guard(task.loss, "loss"),
        metrics={key: replace(metric, values=guard(metric.values, f"the metric {key!r}")) for key, metric in task.metrics.items()},
        example=guard(task.example, "example"),
        logits=guard(task.logits, "logits"),
        augment=guard(task.augment, "augment"),
    )


def _content(path: Path, spec: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, (file.name for file in path.parent.glob("*.py")), n=1)
        hint = f"; did you mean {str(path.with_name(near[0]))!r}?" if near else ""
        raise InputError(f"--task {spec}: there is no file {path}{hint}") from None
    except OSError as error:
        raise InputError(f"--task {spec}: {path} cannot be read ({error.strerror})") from None


def _run(path: Path, content: bytes) -> ModuleType:
    """Run a file as a module of a name of its own; classes that it defines find that module in ``sys.modules``."""
    where = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    module = ModuleType(f"_niwaki_task_{path.stem}_{where}")
    module.__file__ = str(path)
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        exec(compile(content, str(path), "exec", dont_inherit=True), module.__dict__)  # the user's own code, which they asked for
    except BaseException:
        del sys.modules[module.__name__]
        if before is not None:
            sys.modules[module.__name__] = before
        raise
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with suppress(ValueError):  # the file may have taken it out
            sys.path.remove(entry)


@contextmanager
def reported(spec: str, problem: str) -> Iterator[None]:
    """Turn whatever the user's code raises, ``SystemExit`` too, into a TaskFileError with their part of the traceback."""
    try:
        yield
    except NiwakiError:
        raise
    except (Exception, SystemExit) as error:
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename == _run.__code__.co_filename:
            frames = frames.tb_next
        details = "".join(traceback.format_exception(type(error), error, frames))
        first = str(error).strip().partition("\n")[0]
        raise TaskFileError(f"--task {spec}: {problem}: {type(error).__name__}{': ' if first else ''}{first}", details) from None


def _named(module: ModuleType, name: str, spec: str) -> Any:
    if name not in vars(module):
        choices = [
            key for key, value in vars(module).items() if isinstance(value, Task) or (inspect.isfunction(value) and _can_be_called(value))
        ]
        raise InputError(f"--task {spec}: the file has no {name!r}; {did_you_mean(name, choices) if choices else 'it has no task at all'}")
    return vars(module)[name]


def _only(module: ModuleType, spec: str) -> str:
    """Return the name of the one task of a file."""
    found = {key: value for key, value in vars(module).items() if isinstance(value, Task)}
    if len({id(value) for value in found.values()}) == 1:
        return next(iter(found))
    file = module.__file__
    if found:
        raise InputError(f"--task {spec}: the file has several tasks; name one: {', '.join(f'{file}:{key}' for key in found)}")
    raise InputError(f"--task {spec}: the file has no niwaki Task; a function that returns one must be named: {file}:FUNCTION")


def _can_be_called(found: Any) -> bool:
    """Return whether it is a function, or the like, that needs no arguments."""
    if not callable(found):
        return False
    try:
        inspect.signature(found).bind()
    except (TypeError, ValueError):
        return False
    return True


def _kind(found: Any) -> str:
    if inspect.isfunction(found):
        return "a function that needs arguments"
    return f"the class {found.__name__}" if inspect.isclass(found) else f"of type {type(found).__name__}"


def _hash(path: Path, content: bytes) -> str:
    """Return the SHA-256 of a file's code; with that of the modules beside it that it imports, directly or not, if it does."""
    found = {path: content}
    waiting = [content]
    while waiting:
        for name in _imports(waiting.pop()):
            for file in _beside(path.parent, name):
                if file not in found:
                    found[file] = file.read_bytes()
                    waiting.append(found[file])
    hashes = {file.relative_to(path.parent).as_posix(): hashlib.sha256(code).hexdigest() for file, code in found.items()}
    if len(hashes) == 1:
        return hashes[path.name]
    return hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()


def _imports(code: bytes) -> set[str]:
    """Return the first part of the names of all modules that Python code imports by absolute name."""
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError):  # of a module that was never run
        return set()
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and node.level == 0]
    return {name.partition(".")[0] for name in names}


def _beside(folder: Path, name: str) -> list[Path]:
    """Return the files of a module or package of that name in the folder, none when there is none."""
    module = folder / f"{name}.py"
    return sorted((folder / name).rglob("*.py")) or ([module] if module.is_file() else [])
