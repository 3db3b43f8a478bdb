"""``run.json``: everything about a run, in a versioned schema, written at once or not at all."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from niwaki.errors import InputError
from niwaki.formats.files import replacing
from niwaki.removed import Removed
from niwaki.tasks import Training

SCHEMA = "niwaki.run/4"

CHOICES = "niwaki.run/2"
"""Goes into the identity of a run: it changes when equal choices no longer mean an equal run, not with every schema."""
FILE = "run.json"
MODEL_FILE = "model.safetensors"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Dynamics(_Part):
    """How the masks moved since the last epoch (survey 9.1, structure dynamics).

    Attributes:
        overlap: intersection over union of the active weights then and now (Jaccard); 1 when nothing moved.
        pruned: weights that were active then and are not now.
        grown: weights that are active now and were not then.
        ever_active: share of the targets' weights that was active at some time since the stage began (ITOP, Liu et al. 2021).
    """

    overlap: float
    pruned: int
    grown: int
    ever_active: float


class Epoch(_Part):
    """What was known at the end of an epoch.

    Attributes:
        epoch: number of epochs done; not whole where a stage ended within one.
        step: number of optimizer steps done.
        stage: number of the recipe's stage that it belongs to, from 1; repeats are counted.
        train_loss: mean loss over the epoch's batches, while the model learned from them.
        learning_rate: of its last step.
        metrics: the task's metrics on the test examples.
        sparsity: share of the targets' weights that is masked.
        dynamics: how the masks moved; None for dense trainings and while nothing is masked.
    """

    epoch: float
    step: int
    stage: int = 1
    train_loss: float
    learning_rate: float
    metrics: dict[str, float]
    sparsity: float
    dynamics: Dynamics | None = None


class Stage(_Part):
    """One stage that was carried out: what it says, the steps it lasted (``begin`` <= step < ``end``), and the sparsity after it."""

    number: int
    says: str
    begin: int
    end: int
    sparsity: float


class Measure(_Part):
    """One number with its definition, for the dense and the sparse model.

    Attributes:
        name: what is measured.
        unit: ``share``, ``bytes``, ``bits``, ``FLOPs``, ``weights``, ``seconds``, ``milliseconds`` or ``number``.
        definition: what the number means, in words.
        higher_is_better: which way is up; None when there is no better.
        dense: of the dense baseline; None where it has no meaning.
        sparse: of the sparse model; None where it has no meaning.
    """

    name: str
    unit: str
    definition: str
    higher_is_better: bool | None = None
    dense: float | None
    sparse: float | None


class Layer(_Part):
    """One weight tensor: its shape and elements, those that are not masked, and the FLOPs per example that it costs, dense and sparse."""

    name: str
    shape: list[int]
    target: bool
    elements: int
    active: int
    dense_flops: float
    sparse_flops: float


class Storage(_Part):
    """What the sparse model's weights would need in one storage format.

    Attributes:
        format: such as ``dense``, ``bitmap``, ``CSR`` or ``entropy bound``.
        bits: values and positions of all parameters together.
        position_bits: of these, the bits that say where the active weights are.
        definition: the formula, in words.
    """

    format: str
    bits: int
    position_bits: int
    definition: str


class Class(_Part):
    """One class of the test examples: how many there are, and the share of them that each model recognizes (recall)."""

    name: str
    examples: int
    dense_recall: float
    sparse_recall: float


class Predictions(_Part):
    """The class of every test example: the true one, and what each model says; ``classes`` reads them.

    Each is base64 of zlib-compressed little-endian 16-bit class numbers, in the order of the test examples.
    """

    true: str
    dense: str
    sparse: str

    @staticmethod
    def pack(numbers: np.ndarray[Any, Any]) -> str:
        """Return class numbers as text."""
        return base64.b64encode(zlib.compress(np.asarray(numbers, dtype="<u2").tobytes(), 9)).decode()

    @staticmethod
    def unpack(text: str) -> np.ndarray[Any, Any]:
        """Return the class numbers that a text holds."""
        return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<u2").astype(np.int64)


class Start(_Part):
    """The trained weights that a run started from: the file's name and SHA-256."""

    file: str
    sha256: str


class Choices(_Part):
    """Everything that determines a run's numbers, on a given machine, torch version and number of threads.

    Attributes:
        kind: ``run`` (a dense training beside a sparse one) or ``prune`` (a trained model, pruned; the dense model is the trained one).
        task: name of the task.
        task_code: SHA-256 of a user's own task: its file, the modules beside it that it imports, its name; None for built-in tasks.
        data: SHA-256 of the examples.
        model: name of the model.
        start: the trained weights that it starts from, or None.
        method: what was asked for: a name of the catalogue, or the file name of a recipe.
        recipe: the resolved recipe.
        seed: of the initial weights, the order of examples and the sparsifier.
        processes: how many processes train together (each with its part of every batch).
        training: settings of the training, the same for dense and sparse.
    """

    kind: Literal["run", "prune"] = "run"
    task: str
    task_code: str | None = None
    data: str
    model: str
    start: Start | None = None
    method: str
    recipe: dict[str, Any]
    seed: int
    processes: int = 1
    training: Training

    @property
    def method_name(self) -> str:
        """What people call the recipe: the name of the method, or that of its file without folder and ending."""
        return Path(self.method).stem if Path(self.method).suffix in (".yaml", ".yml") else self.method

    def identity(self) -> str:
        """Return the SHA-256 of the choices (without names of methods and files: their contents say it all), in hexadecimal digits."""
        return self._hash(exclude={"method": True, "start": {"file"}})

    def baseline(self) -> str:
        """Return the SHA-256 of what determines the dense baseline alone."""
        return self._hash(exclude={"kind": True, "method": True, "recipe": True, "start": {"file"}})

    def _hash(self, exclude: Any) -> str:
        text = json.dumps(self.model_dump(mode="json", exclude=exclude), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(f"{CHOICES}\n{text}".encode()).hexdigest()


class Stored(_Part):
    """A file of the run: its name, size and SHA-256."""

    file: str
    bytes: int
    sha256: str


class Results(_Part):
    """What a finished run found.

    Attributes:
        measures: the numbers, the headline metric first.
        start_metrics: the task's metrics with the weights of ``choices.start``, before any training; None without one.
        layers: by weight tensor.
        storage: of the sparse model, by format.
        classes: recall by class; empty where targets are no classes.
        predictions: of every test example; None where targets are no classes.
        dense_history: the dense baseline, epoch by epoch.
        sparse_history: the sparse model, epoch by epoch.
        stages: what was done, one after the other.
        masks_hash: of the final masks.
        removed: what ``finish`` of stages took out and added, as ``niwaki.structured.replay`` takes it; empty otherwise.
        notes: sentences from the sparsifier.
        model: the sparse model's file.
    """

    measures: list[Measure]
    start_metrics: dict[str, float] | None = None
    layers: list[Layer]
    storage: list[Storage]
    classes: list[Class]
    predictions: Predictions | None
    dense_history: list[Epoch]
    sparse_history: list[Epoch]
    stages: list[Stage]
    masks_hash: str
    removed: Removed = Field(default_factory=Removed)
    notes: list[str]
    model: Stored


class Record(_Part):
    """The contents of ``run.json``; ``results`` is None until the run has finished."""

    schema_: str = Field(default=SCHEMA, alias="schema")
    identity: str
    choices: Choices
    environment: dict[str, Any]
    results: Results | None = None

    @property
    def headline(self) -> Measure:
        """The task's first metric, of a finished run."""
        assert self.results is not None
        return self.results.measures[0]

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
    if found == "niwaki.run/2":  # told removed tensors alone
        data["schema"] = found = SCHEMA
        if isinstance(data.get("results"), dict):
            data["results"]["removed"] = {"tensors": data["results"].get("removed", {})}
    if found == "niwaki.run/3":  # took out, and did not add
        data["schema"] = found = SCHEMA
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
    with replacing(folder / FILE) as file:
        file.write(text.encode())


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
