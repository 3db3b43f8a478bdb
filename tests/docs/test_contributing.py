"""The method that CONTRIBUTING.md adds is added as it stands there: in a copy of the repository its files are written, its commands run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r'^```(?P<kind>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.DOTALL | re.MULTILINE)


@pytest.mark.timeout(600)
def test_a_method_is_added_as_the_page_says(tmp_path):
    repository, commands = tmp_path / "repository", tmp_path / "bin"
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, repository / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", repository)
    commands.mkdir()
    for name in ("niwaki", "pytest"):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {name} "$@"\n')
        (commands / name).chmod(0o755)
    changed = {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(repository / "src"), "COLUMNS": "110"}
    printed = []
    for kind, title, text in BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        if title == "setup":
            assert "make test" in text
        elif kind == "sh":
            for command in text.splitlines():
                done = subprocess.run(
                    ["sh", "-e", "-c", command], cwd=repository, env=os.environ | changed, capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
                printed.append(done.stdout)
        else:
            with (repository / title).open("a", encoding="utf-8") as file:  # a new one, or the end of one that is there
                file.write(text)
    tests, shown, run = printed
    passed = re.search(r"(\d+) passed", tests)
    assert passed
    assert int(passed[1]) >= 5  # the component's own, and those of its row
    assert "s = (Σ |w|^p)^(1/p) over the piece" in shown
    assert "Saved in runs/soft" in run
    assert not (ROOT / "src/niwaki/saliency/lp_norm.py").exists()
