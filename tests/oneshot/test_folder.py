"""Folders of Hugging Face models, in and out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import niwaki
from niwaki import Recipe
from niwaki.errors import InputError
from niwaki.masks import Masks
from niwaki.oneshot.blockwise import prune_blocks
from niwaki.oneshot.folder import prune_folder, read_masks, write_masks
from niwaki.oneshot.scratch import Settled, appearing
from niwaki.oneshot.windows import batched, windows

transformers = pytest.importorskip("transformers")

RECIPE = Recipe(sparsity=0.5, saliency="wanda")
FAST = {"examples": 6, "length": 12, "batch_size": 3}


def stored(folder):
    """All tensors of the weight files of a folder, as they are on disk."""
    tensors = {}
    for path in Path(folder).glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    return tensors


@pytest.mark.parametrize(("name", "shard"), [("llama", None), ("llama", "10kB"), ("bert", None), ("t5", None)])
def test_a_folder_comes_back_pruned(folder, text, tmp_path, name, shard):
    source = folder(name, shard=shard)
    original = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
    done = prune_folder(source, tmp_path / "out", RECIPE, text, **FAST)
    assert {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()} == original

    before, after = stored(source), stored(tmp_path / "out")
    masks = read_masks(tmp_path / "out")
    assert masks == done.masks
    assert masks.sparsity == 0.5
    assert after.keys() == before.keys()
    for name_, tensor in before.items():
        full = next((n for n in masks if n == name_ or n.endswith(f".{name_}")), None)
        assert torch.equal(after[name_], tensor if full is None else tensor * masks[full]), name_
        assert after[name_].dtype == tensor.dtype

    again = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert type(again).__name__.startswith({"llama": "Llama", "bert": "Bert", "t5": "T5"}[name])
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("the tree")["input_ids"]
    assert (tmp_path / "out" / "README.md").read_text() == "what it is\n"
    assert json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text()) == {"pooling": "mean"}
    assert not (tmp_path / "out" / ".git").exists()
    assert not (tmp_path / "out" / "scratch").exists()
    shards = len(list((tmp_path / "out").glob("model*.safetensors")))
    assert (shards > 1) == (shard is not None)
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["sparsity"] == 0.5
    assert Recipe.from_data(record["recipe"]) == RECIPE
    assert [layer["name"] for layer in record["layers"]] == list(masks)


def test_it_equals_pruning_in_memory(folder, text, tmp_path):
    source = folder()
    prune_folder(source, tmp_path / "out", Recipe(sparsity=0.5, saliency="sparsegpt"), text, seed=3, **FAST)
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    data = batched(model, windows(model, source, text, 6, 12, 3), 3)
    prune_blocks(model, Recipe(sparsity=0.5, saliency="sparsegpt"), data, seed=3)
    after = stored(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(after[name], parameter), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_data_types_stay(folder, text, tmp_path, dtype):
    source = folder(dtype=dtype)
    prune_folder(source, tmp_path / "out", RECIPE, text, **FAST)
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {dtype}


def test_tokens_and_batches_instead_of_text(folder, text, tmp_path):
    source = folder()
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    tokens = windows(model, source, text, 6, 12, 0)
    masks = [
        prune_folder(source, tmp_path / "a", RECIPE, text, **FAST).masks,
        prune_folder(source, tmp_path / "b", RECIPE, tokens, batch_size=3).masks,
        prune_folder(source, tmp_path / "c", RECIPE, [(part, None) for part in tokens.split(3)]).masks,
    ]
    assert masks[0] == masks[1] == masks[2]


def test_tied_weights_stay_tied(folder, text, tmp_path):
    source = folder(tie_word_embeddings=True)
    prune_folder(source, tmp_path / "out", RECIPE, text, **FAST)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight


# ---------------------------------------------------------------- windows


def test_windows_are_pieces_of_the_text(folder, text):
    source = folder()
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    tokens = transformers.AutoTokenizer.from_pretrained(source)(text)["input_ids"]
    pieces = [tokens[i : i + 12] for i in range(0, len(tokens) - 11, 12)]
    chosen = windows(model, source, text, 5, 12, 0).tolist()
    assert len(chosen) == 5
    places = [pieces.index(window) for window in chosen]
    assert places == sorted(places)
    assert windows(model, source, text, 5, 12, 1).tolist() != chosen
    assert windows(model, source, text, 10**6, 12, 0).tolist() == pieces


def test_windows_of_an_encoder_have_its_special_tokens(folder, text):
    source = folder("bert")
    model = transformers.BertModel.from_pretrained(source)
    found = windows(model, source, text, 4, 12, 0)
    assert found.shape == (4, 12)
    assert found[:, 0].tolist() == [2] * 4
    assert found[:, -1].tolist() == [3] * 4
    assert int(found[:, 1:-1].min()) > 3


def test_windows_are_as_long_as_the_model_can_take(folder, text):
    source = folder()
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    assert windows(model, source, text, 4, None, 0).shape == (4, 64)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda f: (f / "config.json").unlink(), {}, "expected a local folder with a config.json"),
        (lambda f: (f / "model.safetensors").unlink(), {}, "it has no weights"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), {}, r"a pickle \(pytorch_model.bin\), which is not read"),
        (lambda f: (f / "config.json").write_text("{"), {}, "its configuration cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 20), {}, "the model cannot be loaded"),
        (lambda f: (f / "tokenizer.json").unlink(), {}, "its tokenizer cannot be read"),
        (lambda f: None, {"length": 65}, "--length: the model takes windows of 1 to 64 tokens, got 65"),
        (lambda f: None, {"data": "the tree"}, "--text: too short: it has 2 tokens, and a window takes 12"),
        (lambda f: None, {"data": torch.zeros(2, 3)}, r"token numbers have shape \[windows, length\], got torch.float32"),
        (lambda f: None, {"blocks": "model.layer"}, "did you mean 'model.layers'"),
        (lambda f: None, {"recipe": Recipe(sparsity=0.5, allocation="global")}, "'global' compares the blocks"),
    ],
)
def test_bad_input_is_told_and_nothing_is_written(folder, text, tmp_path, change, options, message):
    source = folder()
    change(source)
    given = {"recipe": RECIPE, "data": text, **FAST, **options}
    with pytest.raises(InputError, match=message):
        prune_folder(source, tmp_path / "out", given.pop("recipe"), given.pop("data"), **given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_weights_that_are_missing_are_told(folder, text, tmp_path):
    source = folder()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(InputError, match=r"its weights do not fit its configuration: missing model.layers.3"):
        prune_folder(source, tmp_path / "out", RECIPE, text, **FAST)


def test_a_folder_that_exists_is_refused(folder, text, tmp_path):
    source = folder()
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"--out: .*out exists; give a folder that is new"):
        prune_folder(source, tmp_path / "out", RECIPE, text, **FAST)
    assert not any((tmp_path / "out").iterdir())


def test_an_interrupted_run_leaves_nothing(folder, text, tmp_path):
    source = folder()

    def interrupt(done, total):
        if done == 2:
            assert any(path.name.startswith(".out.") for path in tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_folder(source, tmp_path / "out", RECIPE, text, progress=interrupt, **FAST)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


KILLED = """
import sys, time
from pathlib import Path
from niwaki.oneshot.scratch import appearing
with appearing(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_leaves_is_taken_away(tmp_path):
    path = os.pathsep.join([str(Path(niwaki.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with appearing(tmp_path / "out") as folder:  # at work beside a living one
            assert len([path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]) == 2
            folder.rmdir()
            folder.mkdir()
        shutil.rmtree(tmp_path / "out")
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    [left] = tmp_path.iterdir()
    assert (left / "half").exists()
    with appearing(tmp_path / "out") as folder:
        (folder / "whole").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "whole").exists()


# ---------------------------------------------------------------- memory, masks


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_weights_of_a_finished_block_are_in_a_file(tmp_path):
    layer = torch.nn.Linear(64, 64)
    parameters = dict(layer.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    settled = Settled(tmp_path)
    masks = settled.put(layer, {"layer.weight": before["weight"] > 0})
    places = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(tmp_path) in line:
            begin, end = (int(number, 16) for number in line.split()[0].split("-"))
            places.append(range(begin, end))
    for name, parameter in layer.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, before[name])
    assert torch.equal(masks["layer.weight"], before["weight"] > 0)
    for tensor in (*layer.parameters(), *masks.values()):
        assert any(tensor.data_ptr() in place for place in places)
    settled.take(layer)
    assert not any(tensor.data_ptr() in place for tensor in layer.parameters() for place in places)
    with torch.no_grad():
        layer.weight.zero_()
    with safe_open(tmp_path / "1.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("parameter weight"), before["weight"])


def test_masks_come_back(tmp_path):
    masks = Masks({"a": torch.rand(3, 5) > 0.5, "b": torch.ones(2, dtype=torch.bool)})
    write_masks(tmp_path / "masks.safetensors", masks)
    assert read_masks(tmp_path) == masks
    assert read_masks(tmp_path / "masks.safetensors") == masks
    niwaki.save({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="holds no masks of this version"):
        read_masks(tmp_path / "other.safetensors")
