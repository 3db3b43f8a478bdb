"""What a file holds, against numbers that are counted here from the tensors themselves."""

import json
from math import comb, log2, prod

import pytest
import torch
from safetensors.torch import save_file

import niwaki
from niwaki.formats.files import reading


@pytest.fixture
def stored(tmp_path):
    """A container with a masked, a dense, a mostly zero and a tied tensor, and a scalar."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 10, generator=generator)
    mask = torch.rand(12, 10, generator=generator) > 0.8
    weight = weight.masked_fill(~mask, 0.0)
    row, column = mask.nonzero()[0].tolist()
    weight[row, column] = 0.0  # active, and yet zero
    sparse = torch.zeros(4000, dtype=torch.float16)
    sparse[:5] = torch.tensor([1.0, -0.0, 2.0, 3.0, 4.0])  # -0.0 is zero, and has a bit
    state = {"weight": weight, "bias": torch.randn(12, generator=generator), "sparse": sparse, "step": torch.tensor(3)}
    state["tied"] = state["weight"]
    path = tmp_path / "model.safetensors"
    niwaki.save(state, path, masks={"weight": mask})
    return path, state, mask


def inspected(niwaki_command, path):
    outcome = niwaki_command("inspect", path, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    return json.loads(outcome.out)


def bound(elements, kept, bits):
    return (kept * bits + log2(comb(elements, kept))) / 8


def test_a_container(niwaki_command, stored):
    path, state, mask = stored
    data = inspected(niwaki_command, path)
    rows = {row["name"]: row for row in data["tensors"]}
    assert list(rows) == ["weight", "bias", "sparse", "step", "tied"]
    assert {name: tuple(row["shape"]) for name, row in rows.items()} == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert {name: row["zeros"] for name, row in rows.items()} == {name: int((tensor == 0).sum()) for name, tensor in state.items()}
    assert {name: row["dtype"] for name, row in rows.items()} == {
        "weight": "F32", "bias": "F32", "sparse": "F16", "step": "I64", "tied": "F32",
    }  # fmt: skip
    encodings = {"weight": "bitmap", "bias": "dense", "sparse": "bitmap", "step": "dense", "tied": "= weight"}
    assert {name: row["encoding"] for name, row in rows.items()} == encodings

    active = int(mask.sum())
    masked = {"weight": 120 - active, "bias": None, "sparse": None, "step": None, "tied": 120 - active}
    assert {name: row["masked"] for name, row in rows.items()} == masked
    assert {name: row["stored"] for name, row in rows.items()} == {
        "weight": 120 // 8 + 4 * active,
        "bias": 48,
        "sparse": 4000 // 8 + 2 * 5,
        "step": 8,
        "tied": 0,
    }
    assert rows["weight"]["bound"] == pytest.approx(bound(120, active, 32))
    assert rows["bias"]["bound"] == pytest.approx(48)
    assert rows["sparse"]["bound"] == pytest.approx(bound(4000, 5, 16))

    header = int.from_bytes(path.read_bytes()[:8], "little")
    total = data["total"]
    assert total["stored"] == path.stat().st_size - 8 - header  # nothing else is in the file
    assert total["elements"] == 120 + 12 + 4000 + 1  # a tied tensor counts once
    assert (total["masked"], total["zeros"]) == (120 - active, sum(rows[name]["zeros"] for name in ("weight", "bias", "sparse", "step")))
    assert (data["bytes"], data["run"], data["metadata"]) == (path.stat().st_size, None, {"format": "pt"})


def test_the_table_for_people(niwaki_command, stored):
    path, _, mask = stored
    outcome = niwaki_command("inspect", path)
    assert (outcome.code, outcome.err) == (0, "")
    lines = {line.split("  ")[0].strip(): line.split() for line in outcome.out.splitlines() if line.strip()}
    share = f"{100 * (120 - int(mask.sum())) / 120:.2f}"
    assert lines["weight"][:6] == ["weight", "12", "×", "10", "F32", "bitmap"]
    assert lines["weight"][6] == lines["tied"][7] == share
    bits = 8 * (15 + 4 * int(mask.sum())) / 120
    assert f"{bits:.2f}" in lines["weight"]
    assert lines["step"][1] == "scalar"
    assert lines["masked tensors"][2:4] == ["120", "elements"]
    assert lines["all tensors"][2:4] == ["4,133", "elements"]
    assert all(f"\n{word}: " in outcome.out for word in ("masked", "zeros", "stored", "bound"))


def test_a_file_of_someone_else(niwaki_command, tmp_path):
    path = tmp_path / "any.safetensors"
    tensors = {
        "a": torch.tensor([[0.0, 1.0], [2.0, -0.0]], dtype=torch.bfloat16),
        "b": torch.tensor([True, False, False]),
        "c::odd": torch.zeros(0, 3),
        "d": torch.tensor([0.0, 1.0]).to(torch.float8_e4m3fn),
    }
    save_file(tensors, path, metadata={"author": "someone", "note": "x" * 500})
    data = inspected(niwaki_command, path)
    rows = {row["name"]: row for row in data["tensors"]}
    assert {name: row["zeros"] for name, row in rows.items()} == {"a": 2, "b": 2, "c::odd": 0, "d": 1}
    assert {name: row["stored"] for name, row in rows.items()} == {"a": 8, "b": 3, "c::odd": 0, "d": 2}
    assert rows["a"]["bound"] == pytest.approx(bound(4, 3, 16))
    assert {row["encoding"] for row in rows.values()} == {"dense"}
    assert {row["masked"] for row in rows.values()} == {None}
    assert data["total"]["masked"] is None
    assert data["metadata"] == {"author": "someone", "note": "x" * 500}
    outcome = niwaki_command("inspect", path)
    assert outcome.code == 0
    assert "author: someone" in outcome.out
    assert "x" * 300 not in outcome.out.replace("\n", "")


def test_one_tensor_is_in_memory_at_a_time(niwaki_command, stored, monkeypatch):
    path, _, _ = stored
    import niwaki.formats.files as files

    read, seen = files.Reader.read, []
    monkeypatch.setattr(files.Reader, "read", lambda self, name: seen.append(name) or read(self, name))
    inspected(niwaki_command, path)
    with reading(path) as file:
        assert sorted(seen) == sorted(file.names)  # each once


def test_a_run(niwaki_command, tmp_path):
    arguments = ("--task", "digits", "--epochs", "1", "--sparsity", "0.9", "--out", tmp_path / "run")
    assert niwaki_command("run", "gmp", *arguments).code == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    data = inspected(niwaki_command, tmp_path / "run")
    assert data["run"]["identity"] == record["identity"]
    assert data["run"]["choices"] == record["choices"]
    assert data["run"]["measures"] == record["results"]["measures"]
    masks = niwaki.load(tmp_path / "run" / "model.safetensors").masks
    found = {row["name"]: row["masked"] for row in data["tensors"] if row["masked"] is not None}
    assert found == {name: int((~mask).sum()) for name, mask in masks.items()}
    elements = sum(prod(mask.shape) for mask in masks.values())
    assert sum(found.values()) == round(0.9 * elements)
    outcome = niwaki_command("inspect", tmp_path / "run")
    assert "digits · mlp · gmp · seed 0" in " ".join(outcome.out.split())
    headline = record["results"]["measures"][0]
    assert f"{headline['name']} {100 * headline['sparse']:.2f} %" in " ".join(outcome.out.split())


def damaged(path, old, new):
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (lambda path: path.write_bytes(b""), "not a valid safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "not a valid safetensors file"),
        (lambda path: path.write_text("years of work"), "not a valid safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xff"), "is damaged: its check sum does not fit"),
        (lambda path: damaged(path, b'"bias":{"dtype"', b'"sias":{"dtype"'), "bias"),
    ],
)
def test_a_bad_file_is_one_line(niwaki_command, stored, spoil, said):
    path, _, _ = stored
    spoil(path)
    outcome = niwaki_command("inspect", path)
    assert (outcome.code, outcome.out) == (2, "")
    assert said in outcome.err
    assert outcome.err.startswith(f"niwaki: error: {path}: ")
    assert outcome.err.count("\n") == 1


def test_a_component_that_nothing_describes(niwaki_command, stored):
    path, _, _ = stored
    with reading(path) as file:
        tensors = {name: file.read(name) for name in file.names}
        metadata = file.metadata
    save_file({**tensors, "more": torch.ones(2)}, path, metadata=metadata)
    outcome = niwaki_command("inspect", path)
    assert outcome.code == 2
    assert "'more' is not in the niwaki description" in outcome.err


def test_a_folder_without_a_model(niwaki_command, tmp_path):
    outcome = niwaki_command("inspect", tmp_path)
    assert (outcome.code, outcome.out) == (2, "")
    assert "there is no model.safetensors in this folder" in outcome.err
