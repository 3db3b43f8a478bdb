"""The record of a run: its identity, its schema, and how it is read."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from report.records import record
from training import small

import niwaki
from niwaki.errors import InputError
from niwaki.tasks import Training
from niwaki.training import job, run
from niwaki.training.record import SCHEMA, Choices, Predictions, Record, Start, read, write

SCHEMA_FILE = Path(__file__).parents[2] / "docs" / "run.schema.json"
"""Written by: PYTHONPATH=tests python -c 'from training.test_record import *; SCHEMA_FILE.write_text(schema())'"""


def schema() -> str:
    return json.dumps(Record.model_json_schema(by_alias=True), indent=1, sort_keys=True) + "\n"


# ---------------------------------------------------------------- predictions


@pytest.mark.parametrize("numbers", [[], [0], [65535, 0, 1], list(range(1000)) * 3])
def test_predictions_come_back(numbers):
    text = Predictions.pack(np.array(numbers, dtype=np.int64))
    assert text.isascii()
    assert Predictions.unpack(text).tolist() == numbers
    assert Predictions.unpack(text).dtype == np.int64


def test_predictions_can_be_read_with_the_standard_library_alone():
    import base64
    import zlib

    raw = zlib.decompress(base64.b64decode(Predictions.pack(np.array([3, 258]))))
    assert raw == bytes([3, 0, 2, 1])


# ---------------------------------------------------------------- identity

CHOICES = Choices(
    task="plane",
    data="d" * 64,
    model="small",
    start=Start(file="trained.safetensors", sha256="a" * 64),
    method="gmp",
    recipe={"sparsity": 0.5, "schedule": {"cubic": {"end": "0.75 run"}}},
    seed=0,
    training=Training(epochs=3, batch_size=8),
)
OTHER = {
    "kind": "prune",
    "task": "line",
    "task_code": "c" * 64,
    "data": "e" * 64,
    "model": "large",
    "start": Start(file="trained.safetensors", sha256="b" * 64),
    "recipe": {"sparsity": 0.5, "schedule": {"cubic": {"end": "0.5 run"}}},
    "seed": 1,
    "processes": 2,
    "training": Training(epochs=4, batch_size=8),
}
OTHER_TRAINING = {
    "epochs": 4,
    "batch_size": 9,
    "accumulate": 2,
    "optimizer": "adamw",
    "learning_rate": 0.06,
    "momentum": 0.8,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "learning_rate_schedule": "constant",
    "warmup": 0.1,
    "precision": "bfloat16",
    "ema": 0.9,
    "threads": 1,
}


def test_every_field_is_known_here():
    assert {*OTHER, "method"} == set(Choices.model_fields)
    assert set(OTHER_TRAINING) == set(Training.model_fields)


@pytest.mark.parametrize("field", OTHER)
def test_every_choice_decides_a_run(field):
    other = CHOICES.model_copy(update={field: OTHER[field]})
    assert other.identity() != CHOICES.identity()
    assert (other.baseline() == CHOICES.baseline()) == (field in ("kind", "recipe"))


@pytest.mark.parametrize("field", OTHER_TRAINING)
def test_every_setting_of_the_training_decides_a_run_and_its_baseline(field):
    training = CHOICES.training.model_copy(update={field: OTHER_TRAINING[field]})
    other = CHOICES.model_copy(update={"training": training})
    assert other.identity() != CHOICES.identity()
    assert other.baseline() != CHOICES.baseline()


def test_names_of_methods_and_files_decide_nothing():
    renamed = CHOICES.model_copy(update={"method": "my-recipe.yaml", "start": Start(file="elsewhere.safetensors", sha256="a" * 64)})
    assert renamed.identity() == CHOICES.identity()
    assert renamed.baseline() == CHOICES.baseline()
    assert CHOICES.model_copy(update={"start": None}).identity() != CHOICES.identity()


def test_an_identity_is_the_same_in_every_process():
    """A number that must not change, or finished runs would be computed again; a new schema version may change it."""
    assert Choices.model_validate_json(CHOICES.model_dump_json()).identity() == CHOICES.identity()
    shuffled = dict(reversed(CHOICES.model_dump().items()))
    assert Choices.model_validate(shuffled).identity() == CHOICES.identity()


# ---------------------------------------------------------------- reading and writing


def test_a_record_comes_back(tmp_path):
    write(record(), tmp_path)
    assert read(tmp_path) == read(tmp_path / "run.json") == record()
    assert json.loads((tmp_path / "run.json").read_text())["schema"] == SCHEMA


def test_a_record_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write(record(), tmp_path)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(niwaki.NiwakiError, match=r"run\.json: cannot be written: No space left on device"):
        write(record(seed=1), tmp_path)
    assert read(tmp_path) == record()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("schema", ["niwaki.run/1", "niwaki.run/5", "niwaki.sweep/1", None, 2])
def test_another_schema_version_is_refused(tmp_path, schema):
    data = record().model_dump(mode="json", by_alias=True) | {"schema": schema}
    (tmp_path / "run.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"run\.json: its schema is .*, this version reads 'niwaki\.run/4'"):
        read(tmp_path)


def test_a_record_of_the_version_before_did_not_tell_of_added_units(tmp_path):
    data = record().model_dump(mode="json", by_alias=True) | {"schema": "niwaki.run/3"}
    (tmp_path / "run.json").write_text(json.dumps(data))
    assert read(tmp_path) == record()


def test_a_record_of_two_versions_before_told_removed_tensors_alone(tmp_path):
    data = record().model_dump(mode="json", by_alias=True) | {"schema": "niwaki.run/2"}
    data["results"]["removed"] = {"0.weight": {"0": [0, 2]}}
    (tmp_path / "run.json").write_text(json.dumps(data))
    removed = read(tmp_path).results.removed
    assert (removed.tensors, removed.attributes, removed.layers) == ({"0.weight": {"0": [0, 2]}}, {}, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ('{"schema": ' + "[" * 100_000, "cannot be read as JSON"),
        ("[]", "its schema is None"),
        ("{}", "its schema is None"),
        ('{"schema": "niwaki.run/4"}', "identity: Field required"),
        ('{"schema": "niwaki.run/4", "identity": 5}', "identity: "),
    ],
)
def test_a_record_that_is_none_is_told_in_one_line(tmp_path, text, said):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError) as error:
        read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'run.json'}: {said}")
    assert "\n" not in str(error.value)


def test_an_unknown_field_is_refused(tmp_path):
    data = record().model_dump(mode="json", by_alias=True)
    data["results"]["surprise"] = 1
    (tmp_path / "run.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"results\.surprise: Extra inputs are not permitted"):
        read(tmp_path)


def test_a_folder_without_a_record_is_told(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=r"there is no run\.json; give the --out folder of a finished niwaki run"):
            read(path)


# ---------------------------------------------------------------- the schema


def test_the_documented_schema_is_that_of_the_code():
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema()


def test_real_records_follow_the_schema(tmp_path):
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    validator.check_schema(validator.schema)
    text = "stages: [{for: 1 epochs, save: a}, {prune: {fraction: 0.5}, restore: {weights: a}}, {for: 5 steps}]"
    for number, recipe in enumerate((niwaki.method("rigl", sparsity=0.75), small.recipe(text))):
        folder = tmp_path / str(number)
        run(job(small.plane(), recipe, method="rigl", training={"epochs": 1}), folder)
        data = json.loads((folder / "run.json").read_text())
        validator.validate(data)
        assert data["results"]["sparse_history"]
        del data["results"]["measures"][0]["definition"]
        assert [error.message for error in validator.iter_errors(data)]
        unfinished = Record.model_validate(data | {"results": None}).model_dump(mode="json", by_alias=True)
        validator.validate(unfinished)
