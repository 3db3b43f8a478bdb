"""Runs of Hugging Face models that become smaller: the folder that the library loads again."""

import random

import pytest
import torch

import niwaki
from niwaki.formats import load
from niwaki.tasks import find
from niwaki.training import run

transformers = pytest.importorskip("transformers")
WORDS = ("good", "bad", "film", "plot", "a", "the", "very", "badly", "filmed")
SETTINGS = {"epochs": 1, "batch_size": 16, "threads": 1}
RECIPE = """
stages:
- {for: 1 run, UNITS, saliency: magnitude, sparsity: 0.5, allocation: uniform, schedule: one_shot, finish: shrink}
"""


@pytest.fixture
def job(tmp_path):
    """A function that returns what to run: a BERT of two layers, with a tokenizer, on a few sentences."""
    tokenizers = pytest.importorskip("tokenizers")
    data, rng = tmp_path / "data", random.Random(0)
    data.mkdir()
    for name, count in (("train", 32), ("dev", 16)):
        rows = "".join(f"{' '.join(rng.choices(WORDS, k=rng.randrange(1, 9)))}\t{i % 2}\n" for i in range(count))
        (data / f"{name}.tsv").write_text(f"sentence\tlabel\n{rows}")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]").save_pretrained(tmp_path / "bert")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 13}
    config = transformers.BertConfig(**size, max_position_embeddings=32, attn_implementation="eager")
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")

    def prepared(units):
        task = find("sst2", f"hf:{tmp_path / 'bert'}")
        recipe = niwaki.Recipe.from_yaml(RECIPE.replace("UNITS", units))
        return niwaki.training.job(task, recipe, method="test", data_folder=data, training=SETTINGS)

    return prepared


def test_the_library_loads_what_a_run_made_smaller(job, tmp_path):
    made = job("granularity: channel, target: {weights: {include: ['*.intermediate.*']}}")
    record = run(made, tmp_path / "run")
    assert "pretrained/ has the smaller model for from_pretrained" in record.results.notes
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "pretrained", attn_implementation="eager")
    assert again.config.intermediate_size == 12
    model = made.task.build(made.model, made.data, 9)
    load(tmp_path / "run" / "model.safetensors", model)
    model.set_attn_implementation("eager")
    (tokens, mask), _ = made.data.test[torch.arange(16)]
    assert torch.equal(again.eval()(tokens, mask).logits, model.eval()(tokens, mask).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "pretrained")
    assert tokenizer("good film")["input_ids"] == [4, 6]
    smaller = find("sst2", f"hf:{tmp_path / 'run' / 'pretrained'}")  # where the next run may begin
    assert smaller.build(next(iter(smaller.models)), made.data, 0).bert.encoder.layer[1].intermediate.dense.out_features == 12


def test_what_no_configuration_can_say_is_told(job, tmp_path):
    record = run(job("granularity: head"), tmp_path / "run")
    assert record.results.removed
    assert not (tmp_path / "run" / "pretrained").exists()
    [note] = [note for note in record.results.notes if note.startswith("no folder pretrained/ for from_pretrained was written: ")]
    assert "no BertConfig says these sizes" in note
    assert "allocation: uniform" in note
