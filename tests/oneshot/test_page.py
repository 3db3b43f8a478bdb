"""The page on pretrained networks: its examples run, and print what it says."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pretrained.md"


def test_the_examples_run_and_print_what_the_page_says(capsys):
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, re.DOTALL)
    assert len(found) > 4
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        for code, expected in found:
            exec(code, names)  # our own page
            printed = capsys.readouterr().out
            assert printed == expected
