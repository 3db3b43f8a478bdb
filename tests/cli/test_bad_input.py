"""Bad input: one line that says what, where and what would be right, exit 2, nothing written or lost."""

import pytest
import torch
from cli.driving import TASK
from safetensors.torch import save_file

RUN = ("run", "gmp", "--task", "digits", "--out", "out")
PRUNE = ("prune", "gmp", "--task", "digits", "--out", "out")

CASES = {
    "unknown command": (("rnu",), "did you mean 'run'?"),
    "unknown nested command": (("bench", "upkep"), "did you mean 'upkeep'?"),
    "no method": (("run",), "Missing argument 'METHOD'"),
    "no task": (("run", "gmp", "--out", "out"), "--task: missing; choices: digits"),
    "too many arguments": ((*RUN, "more"), "unexpected extra argument"),
    "unknown option": ((*RUN, "--sparsty", "0.9"), "did you mean '--sparsity'?"),
    "unknown method": (("run", "rigel", "--task", "digits", "--out", "out"), "did you mean 'rigl'?"),
    "unknown task": (("run", "gmp", "--task", "digts", "--out", "out"), "did you mean 'digits'?"),
    "unknown model": ((*RUN, "--model", "conv"), "did you mean 'convnet'?"),
    "sparsity of 1": ((*RUN, "--sparsity", "1"), "must be in [0, 1), got 1.0"),
    "negative sparsity": ((*RUN, "--sparsity", "-0.1"), "must be in [0, 1), got -0.1"),
    "sparsity in per cent": ((*RUN, "--sparsity", "90"), "not per cent: 0.9"),
    "sparsity that is no number": ((*RUN, "--sparsity", "nan"), "must be in [0, 1), got nan"),
    "sparsity that is text": ((*RUN, "--sparsity", "much"), "'much' is not a valid float"),
    "sparsity where strength decides": (
        ("run", "str", "--task", "digits", "--sparsity", "0.9", "--out", "out"),
        "strength of 'str' decides",
    ),
    "cut where it has no meaning": ((*RUN, "--sparsity", "0.9", "--cut"), "without a final cut"),
    "cut without sparsity": (("run", "str", "--task", "digits", "--cut", "--out", "out"), "needs the sparsity"),
    "no epochs": ((*RUN, "--epochs", "0"), "--epochs"),
    "negative seed": ((*RUN, "--seed", "-1"), "--seed"),
    "recipe file that is not there": (("run", "none.yaml", "--task", "digits", "--out", "out"), "none.yaml: cannot be read"),
    "unknown component": (("run", "component.yaml", "--task", "digits", "--out", "out"), "did you mean 'magnitude'?"),
    "unknown field": (("run", "field.yaml", "--task", "digits", "--out", "out"), "did you mean 'saliency'?"),
    "not YAML": (("run", "broken.yaml", "--task", "digits", "--out", "out"), "broken.yaml, line 2"),
    "component of later": (("run", "later.yaml", "--task", "digits", "--out", "out"), "adversarial"),
    "pattern without match": (("run", "pattern.yaml", "--task", "digits", "--out", "out"), "'conv9*' matches no weight"),
    "N above M": (("run", "n_m.yaml", "--task", "digits", "--out", "out"), "n_m"),
    "dimension that a block does not divide": (("run", "block.yaml", "--task", "digits", "--out", "out"), "remainder"),
    "foreign folder": (("run", "gmp", "--task", "digits", "--out", "foreign"), "not empty and holds no run.json"),
    "a file as folder": (("run", "gmp", "--task", "digits", "--out", "later.yaml"), "is a file"),
    "a folder below a file": (("run", "gmp", "--task", "digits", "--out", "later.yaml/run"), "is a file"),
    "a folder that cannot be": (("run", "gmp", "--task", "digits", "--out", "/proc/niwaki-run"), "cannot be written"),
    "nothing to compare": (("compare",), "RUNS"),
    "no run to compare": (("compare", "foreign"), "foreign: there is no run.json"),
    "unknown method to show": (("methods", "rigel"), "did you mean 'rigl'?"),
    "sparsity of a benchmark": (("bench", "select", "--scores", "10", "--sparsity", "1.5"), "sparsity must be in [0, 1)"),
    "a name that is too long": (("run", "gmp", "--task", "digits", "--out", "a" * 300), "--out: "),
    "a seed that is too large": ((*RUN, "--seed", str(2**64)), "--seed"),
    "a record that is too deep": (("compare", "deep"), "cannot be read as JSON"),
    "a benchmark without a name": (("bench",), "Missing command"),
    "unknown network": (("bench", "upkeep", "--network", "resnet"), "did you mean 'resnet20'?"),
    "unknown setting": ((*RUN, "--set", "learning_rat=0.1"), "did you mean 'learning_rate'?"),
    "setting without a value": ((*RUN, "--set", "learning_rate"), "--set: 'learning_rate' is no KEY=VALUE"),
    "setting out of range": ((*RUN, "--set", "learning_rate=-1"), "--set: learning_rate: "),
    "setting that is no number": ((*RUN, "--set", "batch_size=many"), "--set: batch_size: "),
    "setting that is no choice": ((*RUN, "--set", "precision=float8"), "'float32', 'bfloat16' or 'float16'"),
    "batch larger than the data": ((*RUN, "--set", "batch_size=1443"), "batch_size=1443 is more than the 1,442 training examples"),
    "no seeds": ((*RUN, "--seeds", "0"), "--seeds"),
    "checkpoints in the future": ((*RUN, "--checkpoint-every", "-1"), "--checkpoint-every"),
    "baselines in a file": ((*RUN, "--baselines", "later.yaml"), "Directory 'later.yaml' is a file"),
    "task without its data": (("run", "gmp", "--task", "mnist", "--out", "out"), "--data DIR or NIWAKI_DATA"),
    "data folder that is not there": (
        ("run", "gmp", "--task", "cifar10", "--data", "none", "--out", "out"),
        "none: there is no such folder",
    ),
    "data file that is damaged": (("run", "gmp", "--task", "mnist", "--data", "data", "--out", "out"), "train-images-idx3-ubyte"),
    "task file that is not there": (("run", "gmp", "--task", "tusk.py:task", "--out", "out"), "did you mean 'task.py'?"),
    "task that is not in its file": (("run", "gmp", "--task", "task.py:tusk", "--out", "out"), "did you mean 'task'?"),
    "wrong labels": (("run", "gmp", "--task", "labels.py:task", "--out", "out"), "labels from 0 to 1, and 1 classes"),
    "no examples": (("run", "gmp", "--task", "none.py:task", "--out", "out"), "has no test examples"),
    "weights that are not there": ((*RUN, "--from", "none.safetensors"), "--from: none.safetensors is no file"),
    "weights that are none": ((*RUN, "--from", "later.yaml"), "later.yaml: not a valid safetensors file"),
    "weights of another model": ((*RUN, "--from", "other.safetensors"), "other.safetensors"),
    "pruning of nothing": (PRUNE, "Missing option '--from'"),
    "pruning without a ranking": (("prune", "str", "--task", "digits", "--from", "other.safetensors"), "str does not rank weights"),
    "pruning in stages": (("prune", "lottery_ticket", "--task", "digits", "--from", "other.safetensors"), "has stages"),
    "rounds without epochs": ((*PRUNE, "--from", "other.safetensors", "--sparsity", "0.9", "--rounds", "2"), "--rounds: "),
    "pruning where strength decides": (("prune", "str", "--task", "digits", "--from", "other.safetensors", "--sparsity", "0.5"), "'str'"),
    "pruning in stages to a sparsity": (
        ("prune", "lottery_ticket", "--task", "digits", "--from", "other.safetensors", "--sparsity", "0.5"),
        "stages, which are for niwaki run",
    ),
    "pruning by scores that are learned": (
        ("prune", "movement", "--task", "digits", "--from", "other.safetensors"),
        "movement learns its scores by training",
    ),
    "epochs twice": ((*RUN, "--epochs", "2", "--set", "epochs=3"), "--set: epochs stands twice"),
    "epochs of pruning twice": (
        (*PRUNE, "--from", "other.safetensors", "--epochs", "2", "--set", "epochs=3"),
        "--set: epochs stands twice",
    ),
    "rounds with no epochs in a setting": ((*PRUNE, "--from", "other.safetensors", "--rounds", "2", "--set", "epochs=0"), "--rounds: "),
    "a folder as method": (("run", ".", "--task", "digits"), "METHOD is a name that `niwaki methods` lists, or a YAML file"),
    "seeds in the folder of a run": (("run", "gmp", "--task", "digits", "--out", "old", "--seeds", "2"), "--out: old holds a run"),
    "a report in place of the record": (("compare", "old", "--report", "old/run.json"), "--report: old/run.json does not end in .html"),
    "a record to inspect": (("inspect", "old/run.json"), "old/run.json: this is JSON; give the run's folder"),
    "a record of before": (("compare", "old"), "its schema is 'niwaki.run/1', this version reads 'niwaki.run/4'"),
}

FILES = {
    "component.yaml": "sparsity: 0.5\nsaliency: magnitud\n",
    "field.yaml": "sparsity: 0.5\nsalience: magnitude\n",
    "broken.yaml": "sparsity: [0.5\n",
    "later.yaml": "sparsity: 0.5\nobjective: adversarial\n",
    "pattern.yaml": "sparsity: 0.5\ntarget: {weights: {include: ['conv9*']}}\n",
    "n_m.yaml": "granularity: {n_m: {n: 5, m: 4}}\n",
    "block.yaml": "sparsity: 0.5\ngranularity: {block: {rows: 7, columns: 1}}\n",
    "foreign/thesis.tex": "years of work",
    "deep/run.json": "[" * 100_000,
    "old/run.json": '{"schema": "niwaki.run/1"}',
    "data/mnist/train-images-idx3-ubyte": "not an image",
    "data/mnist/train-labels-idx1-ubyte": "not a label",
    "task.py": TASK,
    "labels.py": TASK.replace('classes=("no", "yes")', 'classes=("no",)'),
    "none.py": TASK.replace("inputs[480:], labels[480:]", "inputs[600:], labels[600:]"),
}


def contents(folder):
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if "__pycache__" not in name}


@pytest.mark.parametrize("name", CASES)
def test_one_line_exit_2_nothing_written(name, niwaki_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NIWAKI_DATA", raising=False)
    for file, text in FILES.items():
        (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / file).write_text(text)
    save_file({"1.weight": torch.ones(3, 3)}, tmp_path / "other.safetensors")
    before = contents(tmp_path)
    arguments, said = CASES[name]
    outcome = niwaki_command(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("niwaki: error: ")
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.err.endswith("\n")
    assert contents(tmp_path) == before
