"""Dense baselines: trained once, and kept in folders that are named by the hash of everything that determines them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from niwaki.errors import InputError, NiwakiError
from niwaki.formats import load, save
from niwaki.formats.files import replacing
from niwaki.training import checkpoint, processes
from niwaki.training.folder import locked, sha256
from niwaki.training.record import MODEL_FILE, Epoch, Stored
from niwaki.training.state import Interrupted, Trained
from niwaki.training.trainer import Trainer

FILE = "baseline.json"
CHECKPOINT_FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class Sitting:
    """How a training is carried out, which does not change its result.

    Attributes:
        every: seconds between checkpoints.
        stop: asked after each step; when it says so, the state is saved and Interrupted raised.
        progress: called with ``dense`` or ``sparse``, the steps done, the steps of that training, and the epoch that just ended, if
            one did.
        memory: most bytes that statistics may take; None for no limit.
        estimated: called with the most bytes that statistics will take, before anything is collected or trained.
    """

    every: float = 30.0
    stop: Callable[[], bool] = lambda: False
    progress: Callable[[str, int, int, Epoch | None], None] | None = None
    memory: int | None = None
    estimated: Callable[[int], None] = lambda needed: None


class Baseline(BaseModel):
    """What is known of a trained dense model, beside its file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: Literal["niwaki.baseline/1"] = "niwaki.baseline/1"
    identity: str
    history: list[Epoch]
    seconds: float
    model: Stored


def dense(
    make: Callable[[], nn.Module], trainer: Callable[[nn.Module], Trainer], identity: str, folder: Path, sitting: Sitting
) -> tuple[nn.Module, Baseline]:
    """Train the dense model in its folder, or load it when that was done before; another process that does so is waited for.

    Args:
        make: returns the model with its initial weights.
        trainer: returns the dense trainer of a model.
        identity: the hash that the result is kept by.
        folder: of this baseline.
        sitting: how to train.

    Returns:
        the trained model and its :class:`Baseline`.
    """
    with locked(folder, stop=sitting.stop) if processes.rank() == 0 else nullcontext():
        processes.wait_for_all()
        known = _known(folder, identity)
        if known is None:
            model = make()
            done = train(trainer(model), identity, folder, sitting, "dense")
            if processes.rank() == 0:
                path = folder / MODEL_FILE
                with saying_what_is_left(folder):
                    save(model, path)
                    stored = Stored(file=path.name, bytes=path.stat().st_size, sha256=sha256(path))
                    known = Baseline(identity=identity, history=done.history, seconds=done.seconds, model=stored)
                    with replacing(folder / FILE) as file:
                        file.write((json.dumps(known.model_dump(mode="json"), indent=1) + "\n").encode())
        if processes.rank() == 0:
            (folder / CHECKPOINT_FILE).unlink(missing_ok=True)  # also one of a process that was killed just before this
        processes.wait_for_all()
        known = known or _known(folder, identity)
        assert known is not None
        model = make()
        load(folder / MODEL_FILE, model=model)
        return model, known


def train(trainer: Trainer, identity: str, folder: Path, sitting: Sitting, phase: str) -> Trained:
    """Run a training to its end with checkpoints in a folder, from its checkpoint if there is one.

    Raises:
        Interrupted: it was asked to stop; the checkpoint holds all that was done.
        InputError: the checkpoint is damaged or of another training.
        NiwakiError: the training failed, or a checkpoint could not be written; the last one is kept.
    """
    path = folder / CHECKPOINT_FILE
    if path.exists():
        state = checkpoint.load(path)
        if state["identity"] != identity:
            raise InputError(f"{path}: the checkpoint of another training; delete it to begin anew")
        trainer.load(state["trainer"])

    def save_state(state: Callable[[], dict[str, Any]]) -> None:
        if processes.rank() == 0:
            checkpoint.save(path, {"identity": identity, "trainer": state()})

    def tell(step: int, total: int, epoch: Epoch | None) -> None:
        assert sitting.progress is not None
        sitting.progress(phase, step, total, epoch)

    with saying_what_is_left(folder):
        try:
            return trainer.run(save=save_state, every=sitting.every, stop=sitting.stop, progress=tell if sitting.progress else None)
        except Interrupted as error:
            raise Interrupted(f"{phase} training {error}; {path} holds all of it") from None
        except NiwakiError as error:
            raise error.told_as(f"{phase} training stopped at step {trainer.now.step:,} of {trainer.total_steps:,}: {error}") from error


@contextmanager
def saying_what_is_left(folder: Path) -> Iterator[None]:
    """Let the error of what fails inside say which checkpoint is left in the folder.

    Raises:
        NiwakiError: in place of any other error of Niwaki's, but Interrupted.
    """
    try:
        yield
    except Interrupted:
        raise
    except NiwakiError as error:
        path = folder / CHECKPOINT_FILE
        if not folder.is_dir():
            left = f"{folder} is gone, and the checkpoints with it"
        elif not path.exists():
            left = "there is no checkpoint yet"
        else:
            step = checkpoint.load(path)["trainer"]["counters"]["step"]
            left = f"the checkpoint of step {step:,} is intact in {path}"
        raise error.told_as(f"{error}; {left}") from error


def _known(folder: Path, identity: str) -> Baseline | None:
    """Return the finished baseline of a folder, or None when there is none, or its model was changed since."""
    try:
        known = Baseline.model_validate_json((folder / FILE).read_text(encoding="utf-8"))
        path = folder / known.model.file
        return known if known.identity == identity and sha256(path) == known.model.sha256 else None
    except (OSError, ValidationError):
        return None
