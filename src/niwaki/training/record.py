"""``run.json``: everything about a run, in a versioned schema, written at once or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from niwaki.errors import InputError
from niwaki.tasks import Training

SCHEMA = "niwaki.run/1"
FILE = "run.json"
MODEL_FILE = "model.safetensors"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Epoch(_Part):
    """What was known at the end of an epoch.

    Attributes:
        epoch: number of epochs done.
        step: number of batches done.
        train_loss: mean loss over the epoch's batches, while the model learned from them.
        metrics: the task's metrics on the test examples.
        sparsity: share of the targets' weights that is masked.
    """

    epoch: int
    step: int
    train_loss: float
    metrics: dict[str, float]
    sparsity: float


class Measure(_Part):
    """One number with its definition, for the dense and the sparse model.

    Attributes:
        name: what is measured.
        unit: ``share``, ``bytes``, ``FLOPs``, ``weights``, ``seconds`` or ``number``.
        definition: what the number means, in words.
        higher_is_better: which way is up; None when there is no better.
        dense: of the dense baseline.
        sparse: of the sparse model.
    """

    name: str
    unit: str
    definition: str
    higher_is_better: bool | None = None
    dense: float
    sparse: float


class Layer(_Part):
    """One weight tensor: its elements, those that are not masked, and the FLOPs per example that it costs, dense and sparse."""

    name: str
    target: bool
    elements: int
    active: int
    dense_flops: float
    sparse_flops: float


class Choices(_Part):
    """Everything that determines a run's numbers, on a given machine and torch version.

    Attributes:
        task: name of the task.
        model: name of the model.
        method: what was asked for: a name of the catalogue, or the file name of a recipe.
        recipe: the resolved recipe.
        seed: of the initial weights, the order of examples and the sparsifier.
        training: settings of the training, the same for dense and sparse.
    """

    task: str
    model: str
    method: str
    recipe: dict[str, Any]
    seed: int
    training: Training

    def identity(self) -> str:
        """Return the SHA-256 of the choices (without the method's name: the recipe says it all), in hexadecimal digits."""
        text = json.dumps(self.model_dump(mode="json", exclude={"method"}), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(f"{SCHEMA}\n{text}".encode()).hexdigest()


class Stored(_Part):
    """A file of the run: its name, size and SHA-256."""

    file: str
    bytes: int
    sha256: str


class Results(_Part):
    """What a finished run found.

    Attributes:
        measures: the numbers, the headline metric first.
        layers: by weight tensor.
        dense_history: the dense baseline, epoch by epoch.
        sparse_history: the sparse model, epoch by epoch.
        masks_hash: of the final masks.
        notes: sentences from the sparsifier.
        model: the sparse model's file.
    """

    measures: list[Measure]
    layers: list[Layer]
    dense_history: list[Epoch]
    sparse_history: list[Epoch]
    masks_hash: str
    notes: list[str]
    model: Stored


class Record(_Part):
    """The contents of ``run.json``; ``results`` is None until the run has finished."""

    schema_: str = Field(default=SCHEMA, alias="schema")
    identity: str
    choices: Choices
    environment: dict[str, Any]
    results: Results | None = None

    def measure(self, name: str) -> Measure:
        """Return a measure of a finished run by its name."""
        assert self.results is not None
        return next(measure for measure in self.results.measures if measure.name == name)


def read(folder: Path) -> Record:
    """Read the record of a run.

    Raises:
        InputError: there is none, or it is not of this schema.
    """
    try:
        path = folder / FILE if folder.is_dir() else folder
    except OSError as error:
        raise InputError(f"{str(folder)[:80]}: cannot be read ({error.strerror}); give the --out folder of a finished niwaki run") from None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: there is no {FILE}; give the --out folder of a finished niwaki run") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({_first_line(error)}); give the --out folder of a finished niwaki run") from None
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise InputError(f"{path}: its schema is {found!r}, this version reads {SCHEMA!r}")
    try:
        return Record.model_validate(data)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise InputError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def write(record: Record, folder: Path) -> None:
    """Write ``run.json`` into an existing folder, atomically."""
    text = json.dumps(record.model_dump(mode="json", by_alias=True), indent=1, allow_nan=False) + "\n"
    write_atomically(folder / FILE, text.encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by new content such that a reader sees the old one or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
