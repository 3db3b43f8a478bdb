"""Folders of Hugging Face models, in and out: the same model with pruned weights, and its masks beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.formats import files
from niwaki.huggingface import complaining, quiet, transformers_for
from niwaki.masks import Masks
from niwaki.oneshot.blockwise import Blockwise, Data, prune_blocks
from niwaki.oneshot.scratch import Settled, appearing
from niwaki.oneshot.windows import batched, windows
from niwaki.recipe import Recipe

MASKS = "masks.safetensors"
"""The file with the masks in a folder of a pruned model."""

RECORD = "pruning.json"
"""The file that says how a model was pruned: recipe, layers, notes."""

MASKS_VERSION = "niwaki.masks/1"

WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".tflite"})
"""Endings of files that hold the weights of the whole model, as it was."""


def prune_folder(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    data: str | Tensor | Data,
    *,
    examples: int = 128,
    length: int | None = None,
    batch_size: int = 8,
    blocks: str | Sequence[str] = "auto",
    sequential: bool = True,
    outside: Literal["keep", "prune"] = "keep",
    seed: int = 0,
    memory: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Blockwise:
    """Prune a model in a folder, as :func:`niwaki.oneshot.blockwise.prune_blocks` does, into another folder that ``transformers`` loads.

    The weights stay in their files, mapped into memory, until they are used, and those of a block that is done go into a file again: only
    one block with its data is in memory (beside the caches of the operating system, which it takes back as it needs). Writing takes
    the memory of one of the folder's weight files.

    Args:
        source: a local folder with ``config.json`` and ``*.safetensors``, one or several; nothing is downloaded, and no code of it is run.
        out: a new folder. It gets weights of the same names and data types, all other files of the source, the masks
            (``masks.safetensors``, see :func:`read_masks`) and ``pruning.json``. It appears whole or not at all.
        recipe: what to do.
        data: a text, which the folder's tokenizer cuts into windows; token numbers ``[windows, length]``; or batches ``(inputs, targets)``.
        examples: how many windows of a text are used, chosen by the seed.
        length: tokens of a window, special ones included; by default 512, or what the model can take if that is less.
        batch_size: windows of a batch.
        blocks: this and what follows as of ``prune_blocks``.
        sequential: False to rank all blocks together.
        outside: whether targets outside the blocks stay dense.
        seed: of random choices.
        memory: most bytes of statistics and activations.
        device: where a block is while it is pruned.
        progress: called with the blocks done and all blocks.

    Raises:
        InputError: the folder is no model that can be read, the text is too short, ``out`` exists, or what ``prune_blocks`` raises.
    """
    source = Path(source)
    where = f"--model: {source}"
    transformers = transformers_for(where)
    config = _config(source, where, transformers)
    with appearing(Path(out)) as folder:
        model, notes = _load(source, where, transformers, config)
        if isinstance(data, str):
            data = windows(model, source, data, examples, length, seed)
        batches = batched(model, data, batch_size) if isinstance(data, Tensor) else data
        scratch = folder / "scratch"
        scratch.mkdir()
        done = prune_blocks(
            model,
            recipe,
            batches,
            blocks=blocks,
            sequential=sequential,
            outside=outside,
            seed=seed,
            memory=memory,
            device=device,
            progress=progress,
            settled=Settled(scratch),
        )
        notes += _write(model, source, folder, transformers, done.masks)
        done = Blockwise(done.masks, done.layers, done.blocks, (*done.notes, *notes))
        record = {
            "version": 1,
            "recipe": recipe.to_data(),
            "sparsity": done.masks.sparsity,
            "layers": [asdict(layer) for layer in done.layers],
            "notes": list(done.notes),
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(scratch)
    return done


def write_masks(path: str | Path, masks: Masks) -> None:
    """Write masks as packed bits (:func:`niwaki.masks.pack_bits`) into a safetensors file, whole or not at all."""
    shapes = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
    files.write(path, masks.packed(), {"format": "pt", "masks": MASKS_VERSION, "shapes": shapes})


def read_masks(path: str | Path) -> Masks:
    """Return the masks that a file, or the folder of a pruned model, holds.

    Raises:
        InputError: there is no such file, or it holds no masks.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_masks(f"{folder}/masks.safetensors", Masks({"weight": torch.tensor([True, False, False])}))
    ...     read_masks(folder)["weight"]
    tensor([ True, False, False])
    """
    path = Path(path)
    path = path / MASKS if path.is_dir() else path
    with files.reading(path) as file:
        if file.metadata.get("masks") != MASKS_VERSION:
            raise InputError(f"{path}: holds no masks of this version ({MASKS_VERSION})")
        try:
            shapes = files.unique_json(file.metadata["shapes"])
            masks = Masks.unpack({name: file.read(name) for name in file.names}, shapes)
            return Masks({name: masks[name] for name in shapes})  # in the order of the model
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: its masks are damaged ({error})") from None


# ---------------------------------------------------------------- in


def _config(source: Path, where: str, transformers: Any) -> Any:
    if not (source / "config.json").is_file():
        raise InputError(f"{where}: expected a local folder with a config.json; nothing is downloaded")
    if not any(source.glob("*.safetensors")):
        pickle = next(iter(sorted(source.glob("*.bin"))), None)
        problem = "it has no weights" if pickle is None else f"its weights are a pickle ({pickle.name}), which is not read"
        raise InputError(f"{where}: {problem}; save them as model.safetensors")
    with quiet(transformers), complaining(where, "its configuration cannot be read"):
        return transformers.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)


def _load(source: Path, where: str, transformers: Any, config: Any) -> tuple[nn.Module, list[str]]:
    """Return the model of the class that the configuration names, with weights of the data type that they have; and notes."""
    name = next(iter(config.architectures or ()), None)
    kind = transformers.AutoModel if name is None else getattr(transformers, name, None)
    if kind is None:
        raise InputError(f"{where}: transformers has no class {name}, which its configuration names")
    with quiet(transformers), complaining(where, "the model cannot be loaded"):
        model, found = kind.from_pretrained(
            source, dtype="auto", local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{where}: its weights do not fit its configuration: missing {missing[0]}{more}")
    unused = sorted(found["unexpected_keys"])
    notes = [f"weights that the model has no use for were not kept: {', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''}"]
    model.eval()
    return model, notes if unused else []


# ---------------------------------------------------------------- out


def _write(model: Any, source: Path, folder: Path, transformers: Any, masks: Masks) -> list[str]:
    """Write the model, and copy what else the source has; return notes."""
    largest = max(file.stat().st_size for file in source.glob("*.safetensors"))
    with quiet(transformers):
        model.save_pretrained(folder, max_shard_size=largest)
    for file in folder.glob("*.safetensors"):
        shutil.copymode(source / "config.json", file)  # the library makes files that nobody else may read
    write_masks(folder / MASKS, masks)
    left = [file.relative_to(source).as_posix() for file in _others(source, folder)]
    return [f"files with weights as they were are not copied: {', '.join(left)}"] if left else []


def _others(source: Path, folder: Path) -> Iterator[Path]:
    """Copy the files of a model that are no weights of it, and yield those that hold weights and were not written anew."""
    for file in sorted(source.rglob("*")):
        inside = file.relative_to(source)
        if not file.is_file() or any(part.startswith(".") for part in inside.parts) or (folder / inside).exists():
            continue
        top = len(inside.parts) == 1
        if file.suffix == ".onnx" or (top and (file.suffix in WEIGHTS or file.name.endswith(".index.json"))):
            if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
                yield file
            continue
        (folder / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, folder / inside)
