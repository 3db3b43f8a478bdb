"""The tutorial is executed as it stands: its files are written, its commands run, in an empty folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r'^```(?P<kind>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.DOTALL | re.MULTILINE)


def blocks() -> list[tuple[str, str | None, str]]:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    return [(found["kind"], found["title"], found["text"]) for found in BLOCK.finditer(text)]


@pytest.mark.timeout(600)
def test_every_file_and_command_of_the_tutorial_works(tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, module in (("niwaki", "-m niwaki"), ("python", "")):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (commands / name).chmod(0o755)
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "110"}
    place = tmp_path / "place"
    place.mkdir()
    printed = ""
    for kind, title, text in blocks():
        if title == "setup":
            assert "make demo" in text
            assert "\ndemo:" in (ROOT / "Makefile").read_text()
        elif kind == "sh":
            done = subprocess.run(["sh", "-e", "-c", text], cwd=place, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            printed += done.stdout
        else:
            assert title, f"a block of {kind} is neither a file nor a command:\n{text}"
            (place / title).write_text(text)
    record = json.loads((place / "runs" / "gmp" / "run.json").read_text())
    accuracy = record["results"]["measures"][0]
    assert accuracy["name"] == "accuracy"
    assert min(accuracy["dense"], accuracy["sparse"]) > 0.9  # a model that says "benign" of everybody has 0.63
    assert f"accuracy {accuracy['sparse']:.4f}" in printed  # of the file, loaded in plain PyTorch
    for page in ("runs/gmp/report.html", "runs/comparison.html", "runs/sweep/report.html"):
        assert (place / page).read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert len(list((place / "runs" / "sweep").glob("gmp-*/run.json"))) == 24
