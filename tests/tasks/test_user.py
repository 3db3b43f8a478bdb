import hashlib
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from niwaki.errors import InputError
from niwaki.tasks.user import TaskFileError, load

TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from niwaki.tasks import Data, Metric, Model, Task, Training

EXAMPLES = TensorDataset(torch.eye(4), torch.arange(4))
SMALL = Task(
    name="small",
    models={"linear": Model(lambda data: nn.Linear(4, 4), Training(epochs=1, batch_size=2))},
    data=lambda folder: Data(EXAMPLES, EXAMPLES),
    loss=nn.functional.cross_entropy,
    metrics={"accuracy": Metric(lambda outputs, targets: outputs.argmax(1) == targets, "share of right answers")},
)
"""


@pytest.fixture
def write(tmp_path):
    def write(content, name="mine.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content), encoding="utf-8")
        return path

    return write


def _refused(spec, kind=InputError):
    with pytest.raises(kind) as error:
        load(str(spec))
    assert "\n" not in str(error.value)
    assert type(error.value) is kind
    return error.value


def code_of(files, name="SMALL"):
    return hashlib.sha256(f"{files}:{name}".encode()).hexdigest()


def test_two_tasks_of_one_file_are_two(write):
    path = write(TASK + "OTHER = SMALL\n")
    assert load(f"{path}:SMALL").code != load(f"{path}:OTHER").code


@pytest.mark.parametrize("more", [":SMALL", ":make", ":Made", ""])
def test_a_task_or_what_makes_one(write, more):
    path = write(TASK + "def make(name='made'):\n    return SMALL\nclass Made:\n    def __new__(cls):\n        return SMALL\n")
    task = load(f"{path}{more}")
    data = task.data(None)
    assert task.name == "small"
    assert task.build("linear", data, 0)(data.test[torch.arange(3)][0]).shape == (3, 4)
    name = more.removeprefix(":") or "SMALL"
    assert task.code == code_of(hashlib.sha256(path.read_bytes()).hexdigest(), name)


def test_the_path_may_be_relative_and_odd(write, monkeypatch, tmp_path):
    write(TASK, "a:b/my task.v2.py")
    monkeypatch.chdir(tmp_path / "a:b")
    assert load("my task.v2.py:SMALL").name == load("../a:b/my task.v2.py").name == "small"


def test_modules_beside_it_can_be_imported_and_the_process_stays_as_it_was(write, monkeypatch):
    write("VALUE = 5\n", "beside_it_one.py")
    path = write("import beside_it_one\n" + TASK + "def make():\n    import beside_it_two\n    return beside_it_two.change(SMALL)\n")
    write("import dataclasses\nchange = lambda task: dataclasses.replace(task, name='changed')\n", "beside_it_two.py")
    for name in ("beside_it_one", "beside_it_two"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = list(sys.path)
    assert load(f"{path}:make").name == "changed"
    assert sys.path == before
    for name in ("beside_it_one", "beside_it_two"):
        monkeypatch.delitem(sys.modules, name)


def test_the_code_is_that_of_the_file_and_of_what_it_imports_beside_it(write):
    def code(path):
        return load(f"{path}:SMALL").code

    path = write("import json, torch.nn\n" + TASK)
    write("unused = 1\n", "other.py")
    alone = code(path)
    assert alone == code_of(hashlib.sha256(path.read_bytes()).hexdigest())
    write("unused = 2\n", "other.py")
    assert code(path) == alone
    path = write("if False:\n    from package_a import x\n" + TASK)
    first = code(path)
    assert first == code_of(hashlib.sha256(path.read_bytes()).hexdigest())  # there is no package_a
    write("import module_b\n", "package_a/deep/inner.py")
    write("from . import x\n", "package_a/__init__.py")
    second = code(path)
    write("x = 1\n", "module_b.py")
    third = code(path)
    write("x = (\n", "module_b.py")  # not even Python, but never run
    fourth = code(path)
    assert len({first, second, third, fourth}) == 4
    files = {
        name: (path.parent / name).read_bytes() for name in ("mine.py", "module_b.py", "package_a/__init__.py", "package_a/deep/inner.py")
    }
    listing = "".join(f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in sorted(files.items()))
    assert fourth == code_of(hashlib.sha256(listing.encode()).hexdigest())


def test_two_files_of_one_name_are_two_modules(write):
    first, second = write(TASK, "a/mine.py"), write(TASK.replace('"small"', '"second"'), "b/mine.py")
    tasks = [load(str(path)) for path in (first, second, first)]
    assert [task.name for task in tasks] == ["small", "second", "small"]


def test_classes_of_the_file_know_their_module(write):
    path = write(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar, get_type_hints\n"
        "@dataclass\nclass Options:\n    kind: ClassVar[str] = 'x'\n    width: int = 4\n"
        "assert get_type_hints(Options)['width'] is int\n" + TASK
    )
    assert load(str(path)).name == "small"


def test_annotations_are_not_those_of_niwaki(write):
    path = write(TASK + "def f(x: int): ...\nassert f.__annotations__ == {'x': int}\n")
    assert load(str(path)).name == "small"


def test_names_that_are_not_there_offer_the_nearest(write, tmp_path):
    path = write(TASK + "def make():\n    return SMALL\ndef other(x): ...\n")
    assert "did you mean 'SMALL'? choices: SMALL, make" in str(_refused(f"{path}:SMAL"))
    assert "there is no file" in str(_refused(tmp_path / "none" / "x.py:SMALL"))
    assert f"did you mean '{path}'" in str(_refused(tmp_path / "mime.py"))
    assert "it has no task at all" in str(_refused(f"{write('x = 1', 'empty.py')}:task"))
    assert "cannot be read (Is a directory)" in str(_refused(f"{tmp_path}:SMALL"))


def test_which_of_the_files_tasks_is_meant_must_be_clear(write):
    path = write(TASK + "AGAIN = SMALL\n")
    assert load(str(path)).name == "small"
    path = write(TASK + "from dataclasses import replace\nOTHER = replace(SMALL, name='other')\n")
    assert f"several tasks; name one: {path}:SMALL, {path}:OTHER" in str(_refused(path))
    path = write("def make(): ...\n")
    assert f"the file has no niwaki Task; a function that returns one must be named: {path}:FUNCTION" in str(_refused(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", "'number' is of type int; expected a niwaki Task, or a function without arguments that returns one"),
        ("needs", "'needs' is a function that needs arguments; expected"),
        ("Task", "'Task' is the class Task; expected"),
        ("nothing", "'nothing' returned of type NoneType; expected a niwaki Task"),
    ],
)
def test_objects_of_another_kind_are_refused(write, name, message):
    path = write(TASK + "number = 3\ndef needs(x): ...\ndef nothing(): ...\n")
    assert message in str(_refused(f"{path}:{name}"))


def test_an_error_in_the_file_shows_its_own_traceback_and_no_frame_of_niwaki(write):
    path = write("def divide(x):\n    return 1 / x\n\nresult = divide(0)\n")
    error = _refused(f"{path}:task", TaskFileError)
    assert str(error) == f"--task {path}:task: cannot be imported: ZeroDivisionError: division by zero"
    assert error.details.startswith(f'Traceback (most recent call last):\n  File "{path}", line 4, in <module>\n    result = divide(0)\n')
    assert f'File "{path}", line 2, in divide' in error.details
    assert error.details.endswith("ZeroDivisionError: division by zero\n")
    assert error.details.count("Traceback") == 1
    assert str(Path(sys.modules[load.__module__].__file__).parent) not in error.details
    assert error.__cause__ is None
    assert error.__suppress_context__


def test_what_led_to_the_error_is_shown_too(write):
    path = write("try:\n    int('x')\nexcept ValueError as error:\n    raise RuntimeError('first\\nsecond') from error\n")
    error = _refused(path, TaskFileError)
    assert str(error).endswith("RuntimeError: first")
    assert error.details.count("Traceback") == 2
    assert "niwaki/tasks" not in error.details


@pytest.mark.parametrize(
    ("content", "message", "shown"),
    [
        ("x = (\n", "SyntaxError: '(' was never closed", "    x = (\n"),
        ("import no_such_module_here\n", "ModuleNotFoundError: No module named 'no_such_module_here'", "import no_such_module_here"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3", "sys.exit(3)"),
        ("x = 1\x00\n", "null bytes", "null bytes"),
        ("assert False\n", "AssertionError", "assert False"),
        ("import broken_beside\n", "NameError: name 'oops' is not defined", 'broken_beside.py", line 1'),
    ],
)
def test_whatever_the_file_raises_is_reported(write, content, message, shown):
    write("oops\n", "broken_beside.py")
    before = set(sys.modules)
    error = _refused(f"{write(content)}:task", TaskFileError)
    assert message in str(error)
    assert shown in error.details
    assert "niwaki" not in error.details.replace("_niwaki_task", "")
    assert set(sys.modules) == before


def test_ctrl_c_stays_ctrl_c(write):
    with pytest.raises(KeyboardInterrupt):
        load(f"{write('raise KeyboardInterrupt')}:task")


def test_an_error_in_the_function_that_makes_the_task(write):
    path = write("def make():\n    return {}['key']\n")
    error = _refused(f"{path}:make", TaskFileError)
    assert str(error) == f"--task {path}:make: failed: KeyError: 'key'"
    assert error.details.startswith(f'Traceback (most recent call last):\n  File "{path}", line 2, in make\n')
