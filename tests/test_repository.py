"""What stands beside the code: pages, pins and packaging."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import niwaki
from niwaki.component import REGISTRY
from niwaki.recipe import Recipe

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")))


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_of_a_page_runs_as_one_script(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "\n\n".join(python_blocks(page))
    names: dict[str, Any] = {"__name__": "__main__"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(REGISTRY, "saliency", dict(REGISTRY["saliency"]))  # a page may register a component
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a page should not teach what warns
        exec(compile(script, page, "exec", dont_inherit=True), names)
        for name, test in list(names.items()):
            if name.startswith("test_"):
                test()


def test_vocabulary_has_every_field_of_a_recipe() -> None:
    first_table = (ROOT / "docs/vocabulary.md").read_text().split("\n## ")[1]
    assert set(re.findall(r"^\| (\w+) \|", first_table, re.MULTILINE)) - {"word"} == set(Recipe.model_fields)


def test_architecture_shows_every_module() -> None:
    picture, layers = (ROOT / "docs/architecture.md").read_text().split("\n## ")[1:3]
    package = ROOT / "src/niwaki"
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(re.findall(r"^  (\w+)(?:/|\.py) ", picture, re.MULTILINE)) == modules
    table = "\n".join(line for line in layers.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`(\w+)`", table)) == modules - {"__init__"}


def test_every_dependency_is_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values())
    asked = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    names = {re.match(r"[\w.-]+", requirement)[0] for requirement in asked}  # type: ignore[index]
    assert names <= {name.lower() for name in pins} | set(pins)


def test_versions_agree() -> None:
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"] == niwaki.__version__


def test_typing_marker_is_shipped() -> None:
    assert files("niwaki").joinpath("py.typed").is_file()


def test_import_loads_only_what_it_needs() -> None:
    # In a process of its own: other tests have long imported everything.
    code = "import sys, niwaki; print(*sorted({'click', 'rich', 'sklearn', 'scipy'} & {name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_public_face_is_there_without_loading_torch_first():
    script = (
        "import sys, niwaki; assert 'torch' not in sys.modules\n"
        "from niwaki import *\n"
        "assert all(name in globals() for name in niwaki.__all__) and set(niwaki.__all__) <= set(dir(niwaki))\n"
        "assert Sparsifier is niwaki.sparsifier.Sparsifier and not hasattr(niwaki, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
