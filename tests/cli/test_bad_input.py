"""Bad input: one line that says what, where and what would be right, exit 2, nothing written or lost."""

import pytest

RUN = ("run", "gmp", "--task", "digits", "--out", "out")

CASES = {
    "unknown command": (("rnu",), "did you mean 'run'?"),
    "unknown nested command": (("bench", "upkep"), "did you mean 'upkeep'?"),
    "no method": (("run",), "Missing argument 'METHOD'"),
    "no task": (("run", "gmp", "--out", "out"), "--task is missing; choices: digits"),
    "no folder": (("run", "gmp", "--task", "digits"), "--out is missing"),
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
    "component of later": (("run", "later.yaml", "--task", "digits", "--out", "out"), "woodfisher"),
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
}

FILES = {
    "component.yaml": "sparsity: 0.5\nsaliency: magnitud\n",
    "field.yaml": "sparsity: 0.5\nsalience: magnitude\n",
    "broken.yaml": "sparsity: [0.5\n",
    "later.yaml": "sparsity: 0.5\nsaliency: woodfisher\n",
    "pattern.yaml": "sparsity: 0.5\ntarget: {weights: {include: ['conv9*']}}\n",
    "n_m.yaml": "granularity: {n_m: {n: 5, m: 4}}\n",
    "block.yaml": "sparsity: 0.5\ngranularity: {block: {rows: 7, columns: 1}}\n",
    "foreign/thesis.tex": "years of work",
    "deep/run.json": "[" * 100_000,
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_exit_2_nothing_written(name, niwaki_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, text in FILES.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    arguments, said = CASES[name]
    outcome = niwaki_command(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("niwaki: error: ")
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.err.endswith("\n")
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == FILES
