"""The decoder that the format's page shows, run as a stranger would: NumPy and the standard library only."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from formats.states import bits, state_and_masks
from hypothesis import given, settings
from torch import Tensor

from niwaki.formats import load, save

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
SOURCE = next(iter(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))


def decoder() -> Any:
    names: dict[str, Any] = {}
    exec(compile(SOURCE, "docs/format.md", "exec"), names)
    return names["decode"]


@settings(max_examples=100, deadline=None)
@given(state_and_masks())
def test_the_decoder_reads_every_file(tmp_path_factory: pytest.TempPathFactory, pair: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    state, masks = pair
    state |= {f"{name}.tied": tensor for name, tensor in state.items()}
    path = tmp_path_factory.getbasetemp() / "decoder.safetensors"
    save(state, path, masks=masks)
    tensors, found = decoder()(path)
    assert set(tensors) == set(state)
    assert set(found) == set(masks)
    assert all(tensors[name].tobytes() == bits(tensor) and tensors[name].shape == tensor.shape for name, tensor in state.items())
    assert all(found[name].tobytes() == bits(mask) and found[name].shape == mask.shape for name, mask in masks.items())


def test_the_decoder_needs_numpy_alone(tmp_path: Path) -> None:
    save({"w": torch.tensor([[1.5, 0.0], [0.0, -2.0]])}, tmp_path / "file", masks={"w": torch.eye(2) > 0})
    check = """
tensors, masks = decode(sys.argv[1])
assert tensors["w"].view("<f4").tolist() == [[1.5, 0], [0, -2]] and masks["w"].tolist() == [[True, False], [False, True]]
assert not {"torch", "safetensors", "niwaki"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-I", "-c", f"import sys\n{SOURCE}{check}", str(tmp_path / "file")], check=True)
    code = [line for line in SOURCE.splitlines() if line.strip()]
    assert len(code) <= 32


def test_the_decoder_reads_a_file_that_says_what_was_removed(tmp_path: Path) -> None:
    shown = json.loads(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])
    weight = torch.arange(6.0).reshape(3, 2)
    save({"blocks.1.up.weight": weight}, tmp_path / "file", removed=shown)
    assert load(tmp_path / "file").removed.model_dump() == shown
    tensors, _ = decoder()(tmp_path / "file")
    assert tensors["blocks.1.up.weight"].tobytes() == bits(weight)


def test_the_page_shows_a_description_like_those_written(tmp_path: Path) -> None:
    import safetensors

    shown = json.loads(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[0])
    weight = torch.eye(3)
    save(
        {"encoder.weight": weight, "encoder.bias": torch.ones(2), "decoder.weight": weight},
        tmp_path / "file",
        masks={"encoder.weight": weight > 0},
    )
    with safetensors.safe_open(tmp_path / "file", framework="pt") as file:
        written = json.loads(file.metadata()["niwaki"])

    def skeleton(data: Any) -> Any:
        return {name: skeleton(value) for name, value in data.items()} if isinstance(data, dict) else type(data)

    assert skeleton(shown) == skeleton(written)
    assert list(shown) == list(written)
