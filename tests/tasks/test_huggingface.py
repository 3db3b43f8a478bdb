import json
import random
import socket
import sys

import pytest
import torch

import niwaki
from niwaki.errors import InputError
from niwaki.metrics import forward_flops
from niwaki.tasks import TASKS
from niwaki.tasks.huggingface import FINE_TUNING, adapt
from niwaki.tasks.sentences import SST2
from niwaki.tasks.text import CHARACTERS

WORDS = ["good", "bad", "film", "plot", "a", "the", "very", "badly", "filmed"]


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("tried to reach the network"))
    return pytest.importorskip("transformers")


@pytest.fixture
def data(tmp_path):
    """A folder with sentences and a text."""
    folder, rng = tmp_path / "data", random.Random(0)
    folder.mkdir()
    for name, count in (("train", 40), ("dev", 20)):
        rows = "".join(f"{' '.join(rng.choices(WORDS, k=rng.randrange(1, 9)))}\t{i % 2}\n" for i in range(count))
        (folder / f"{name}.tsv").write_text(f"sentence\tlabel\n{rows}")
    (folder / "some.txt").write_text(" ".join(rng.choices(WORDS, k=2000)))
    return folder


def _config(transformers, kind, **changes):
    size = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "bert":
        return transformers.BertConfig(**{**size, "intermediate_size": 24, "max_position_embeddings": 32, **changes})
    if kind == "bloom":
        return transformers.BloomConfig(**{**size, **changes})
    return transformers.LlamaConfig(**{**size, "intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 32, **changes})


def _tokenizer(transformers, padding="[PAD]"):
    """A tokenizer of the library: WordPiece with special tokens around a sentence."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS[:7], "##ly", "##ed"]
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=padding, eos_token="[SEP]", unk_token="[UNK]")


def _folder(tmp_path, config, *, tokenizer=None, model=None):
    folder = tmp_path / "model"
    for part in (config, tokenizer, model):
        if part is not None:
            part.save_pretrained(folder)
    return folder


def _only(task):
    (name,) = task.models
    return name


def _built(task, data):
    return task.build(_only(task), task.data(data), seed=0)


def _refused(task, folder, data=None):
    with pytest.raises(InputError) as error:
        _built(adapt(task, folder), data)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"--model hf:{folder}: ")
    return str(error.value)


def test_without_the_library_it_says_how_to_get_it(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'niwaki[hf]'" in _refused(SST2, tmp_path)


def test_only_tasks_on_text_can_have_such_models(tmp_path):
    assert "the task 'digits' is not on text" in _refused(TASKS["digits"], tmp_path)


@pytest.mark.parametrize("name", ["nothing", "bert-base-uncased", "empty"])
def test_what_is_no_model_is_refused_and_never_looked_for_elsewhere(name, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "expected a local folder with a config.json, or such a file; nothing is downloaded" in _refused(SST2, name)


def test_a_configuration_alone_has_the_tasks_own_vocabulary_and_random_weights(transformers, tmp_path, data):
    folder = _folder(tmp_path, _config(transformers, "bert"), tokenizer=_tokenizer(transformers))
    task = adapt(SST2, folder / "config.json")
    name, examples = f"hf:{folder / 'config.json'}", task.data(data)
    assert list(task.models) == [name]
    assert task.models[name].training == SST2.model()[1].training
    assert examples.facts["vocabulary"] == SST2.data(data).facts["vocabulary"] == 11  # two special words and all nine
    before = torch.random.get_rng_state()
    first, same, other = (task.build(name, examples, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.get_input_embeddings().weight.shape == (11, 16)
    pairs = [(a, b, c) for a, b, c in zip(*(m.state_dict().values() for m in (first, same, other)), strict=True)]
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)
    assert first.training


def test_sentences_are_cut_by_the_folders_tokenizer_and_its_weights_are_used(transformers, tmp_path, data):
    config, tokenizer = _config(transformers, "bert", vocab_size=13), _tokenizer(transformers)
    theirs = transformers.BertForSequenceClassification(config).eval()
    task = adapt(SST2, _folder(tmp_path, config, tokenizer=tokenizer, model=theirs))
    examples = task.data(data)
    sentences = [line.split("\t")[0] for line in (data / "dev.tsv").read_text().splitlines()[1:]]
    (tokens, mask), labels = examples.test[torch.arange(20)]
    for i, sentence in enumerate(sentences):
        expected = tokenizer(sentence, truncation=True, max_length=tokens.shape[1])["input_ids"]
        assert tokens[i].tolist() == expected + [0] * (tokens.shape[1] - len(expected))
        assert mask[i].tolist() == [1] * len(expected) + [0] * (tokens.shape[1] - len(expected))
    model = task.build(_only(task), examples, seed=0).eval()
    assert task.model()[1].training == FINE_TUNING
    assert model.state_dict().keys() == theirs.state_dict().keys()
    for i in range(20):  # one by one, without any padding
        alone = theirs(input_ids=tokens[i : i + 1, : int(mask[i].sum())]).logits
        torch.testing.assert_close(model(tokens[i : i + 1], mask[i : i + 1]).logits, alone, rtol=1e-4, atol=1e-6)
    outputs = model(tokens, mask)
    assert torch.equal(task.logits(outputs), outputs.logits)
    assert task.loss(outputs, labels).item() == pytest.approx(theirs(tokens, mask, labels=labels).loss.item(), rel=1e-5)
    assert torch.equal(task.metrics["accuracy"].values(outputs, labels), outputs.logits.argmax(1) == labels)


def test_a_causal_model_that_takes_no_mask_there_classifies_as_if_nothing_were_filled_up(transformers, tmp_path, data):
    config = _config(transformers, "bloom", vocab_size=13, pad_token_id=0)
    tokenizer = _tokenizer(transformers)
    theirs = transformers.BloomForSequenceClassification(config).eval()
    task = adapt(SST2, _folder(tmp_path, config, tokenizer=tokenizer, model=theirs))
    examples = task.data(data)
    tokens, _ = examples.test[torch.arange(20)]
    model = task.build(_only(task), examples, seed=0).eval()
    found = model(tokens).logits
    for i in range(20):
        alone = tokens[i : i + 1, : int((tokens[i] != 0).sum())]
        torch.testing.assert_close(found[i : i + 1], theirs(input_ids=alone).logits, rtol=1e-4, atol=1e-6)


def test_a_text_is_cut_by_the_folders_tokenizer_without_special_tokens(transformers, tmp_path, data):
    config, tokenizer = _config(transformers, "llama", vocab_size=13), _tokenizer(transformers)
    theirs = transformers.LlamaForCausalLM(config).eval()
    task = adapt(CHARACTERS, _folder(tmp_path, config, tokenizer=tokenizer, model=theirs))
    examples = task.data(data)
    text = (data / "some.txt").read_text()
    expected = tokenizer(text[: len(text) * 9 // 10], add_special_tokens=False)["input_ids"]
    tokens, targets = examples.train[torch.arange(len(examples.train))]
    assert tokens.shape[1] == 32  # what the model can take
    assert tokens.flatten().tolist() == expected[: tokens.numel()]
    assert list(task.metrics) == ["loss", "accuracy", "bits_per_token"]
    model = task.build(_only(task), examples, seed=0).eval()
    outputs = model(tokens[:3])
    whole = torch.tensor([expected[:33]])
    assert task.loss(model(tokens[:1]), targets[:1]).item() == pytest.approx(
        torch.nn.functional.cross_entropy(theirs(whole[:, :-1]).logits[0], whole[0, 1:]).item(), rel=1e-5
    )
    assert task.metrics["loss"].values(outputs, targets[:3]).mean().item() == pytest.approx(
        task.loss(outputs, targets[:3]).item(), rel=1e-5
    )


def test_characters_are_the_vocabulary_without_a_tokenizer(transformers, tmp_path, data):
    task = adapt(CHARACTERS, _folder(tmp_path, _config(transformers, "llama")))
    examples = task.data(data)
    model = task.build(_only(task), examples, seed=0)
    assert model.get_input_embeddings().weight.shape[0] == len(set((data / "some.txt").read_text()))
    assert list(task.metrics) == list(CHARACTERS.metrics)


def test_a_model_that_sees_what_it_is_to_guess_is_refused(transformers, tmp_path, data):
    assert "sees the token that it is to guess" in _refused(CHARACTERS, _folder(tmp_path, _config(transformers, "bert")), data)
    folder = _folder(tmp_path, _config(transformers, "bert", is_decoder=True))
    task = adapt(CHARACTERS, folder)
    _built(task, data)


@pytest.mark.parametrize(("base", "kind"), [(SST2, "bert"), (SST2, "llama"), (SST2, "bloom"), (CHARACTERS, "llama")])
def test_a_sparsifier_trains_it_and_its_operations_are_counted(transformers, tmp_path, data, base, kind):
    task = adapt(base, _folder(tmp_path, _config(transformers, kind)))
    examples = task.data(data)
    model = task.build(_only(task), examples, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sparsifier = niwaki.Sparsifier(model, niwaki.method("rigl", sparsity=0.8), total_steps=200, steps_per_epoch=200).attach(optimizer)
    losses = []
    for _ in range(10):
        inputs, targets = examples.train[torch.arange(8)]
        loss = task.loss(model(*inputs) if isinstance(inputs, tuple) else model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    sparsifier.finalize()
    assert losses[-1] < losses[0]
    assert sparsifier.sparsity == pytest.approx(0.8, abs=0.01)
    counted = forward_flops(model, task.example(examples), masks=sparsifier.masks)
    targets = {layer.name: layer for layer in counted.layers if layer.name in sparsifier.masks}
    length = examples.facts["length"]
    for name, weight in model.named_parameters():
        if name in targets and "pooler" not in name:
            assert targets[name].dense == 2 * weight.numel() * length
            assert targets[name].sparse == 2 * int(weight.count_nonzero()) * length
    path = tmp_path / "saved.safetensors"
    niwaki.save(model, path, masks=sparsifier.masks)
    fresh = task.build(_only(task), examples, seed=1)
    niwaki.load(path, model=fresh)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in fresh.state_dict().items())


def test_a_new_head_is_random_and_anything_else_that_is_missing_is_refused(transformers, tmp_path, data):
    config = _config(transformers, "bert", vocab_size=13)
    body = transformers.BertModel(config, add_pooling_layer=False)
    folder = _folder(tmp_path, config, tokenizer=_tokenizer(transformers), model=body)
    task = adapt(SST2, folder)
    model = _built(task, data)
    assert all(torch.equal(value, model.state_dict()[f"bert.{name}"]) for name, value in body.state_dict().items())
    _config(transformers, "bert", vocab_size=13, num_hidden_layers=3).save_pretrained(folder)
    assert "its weights do not fit its configuration: missing bert.encoder.layer.2." in _refused(SST2, folder, data)
    _config(transformers, "bert", vocab_size=13, intermediate_size=20).save_pretrained(folder)
    assert "its weights do not fit its configuration: mismatched bert.encoder.layer.0.intermediate" in _refused(SST2, folder, data)


def test_a_language_model_needs_its_head(transformers, tmp_path, data):
    config = _config(transformers, "llama", vocab_size=13)
    folder = _folder(tmp_path, config, tokenizer=_tokenizer(transformers), model=transformers.LlamaModel(config))
    assert "its weights do not fit its configuration: missing lm_head.weight" in _refused(CHARACTERS, folder, data)


def test_a_head_for_other_classes_is_replaced(transformers, tmp_path, data):
    config = _config(transformers, "bert", vocab_size=13, num_labels=5)
    task = adapt(
        SST2, _folder(tmp_path, config, tokenizer=_tokenizer(transformers), model=transformers.BertForSequenceClassification(config))
    )
    examples = task.data(data)
    assert task.build(_only(task), examples, seed=0).eval()(*task.example(examples)).logits.shape == (1, 2)


def test_weights_are_read_in_single_precision_whatever_the_folder_says(transformers, tmp_path, data):
    config = _config(transformers, "bert", vocab_size=13)
    theirs = transformers.BertForSequenceClassification(config).bfloat16()
    task = adapt(SST2, _folder(tmp_path, config, tokenizer=_tokenizer(transformers), model=theirs))
    model = _built(task, data)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_weights_and_vocabulary_must_fit(transformers, tmp_path, data):
    config = _config(transformers, "bert", vocab_size=12)
    folder = _folder(tmp_path, config, tokenizer=_tokenizer(transformers))
    assert "its tokenizer knows 13 tokens, its configuration 12" in _refused(SST2, folder, data)
    folder = _folder(tmp_path / "other", config, model=transformers.BertForSequenceClassification(config))
    assert "has weights for 12 tokens but no tokenizer, and the task's own vocabulary has 11" in _refused(SST2, folder, data)
    config = _config(transformers, "bert", vocab_size=11)
    task = adapt(SST2, _folder(tmp_path / "third", config, model=transformers.BertForSequenceClassification(config)))
    _built(task, data)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", "its configuration cannot be read: "),
        ("config.json", b'{"model_type": "zork"}', "its configuration cannot be read: "),
        ("config.json", b'{"model_type": "vit"}', "transformers has no model of type 'vit' for sequence classification"),
        ("tokenizer.json", b"{", "its tokenizer cannot be read: "),
        ("model.safetensors", b"abc", "the model cannot be built: SafetensorError"),
        ("pytorch_model.bin", b"abc", "its weights are a pickle (pytorch_model.bin), which is not read; save them as model.safetensors"),
    ],
)
def test_files_that_cannot_be_read_are_one_line(transformers, tmp_path, data, file, content, message):
    folder = _folder(tmp_path, _config(transformers, "bert"), tokenizer=_tokenizer(transformers))
    (folder / file).write_bytes(content)
    assert message in _refused(SST2, folder, data)


def test_no_code_of_the_folder_is_run(transformers, tmp_path, data):
    folder = _folder(tmp_path, _config(transformers, "bert"))
    (folder / "config.json").write_text(json.dumps({"model_type": "zork", "auto_map": {"AutoConfig": "evil.Config"}}))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert "its configuration cannot be read" in _refused(SST2, folder, data)


def test_the_code_is_the_hash_of_all_that_is_read(transformers, tmp_path):
    folder = _folder(tmp_path, _config(transformers, "bert"), tokenizer=_tokenizer(transformers))
    first = adapt(SST2, folder).code
    (folder / "README.md").write_text("words")
    assert adapt(SST2, folder).code == first
    _config(transformers, "bert", num_hidden_layers=3).save_pretrained(folder)
    second = adapt(SST2, folder).code
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace("good", "fine"))
    assert len({first, second, adapt(SST2, folder).code, adapt(SST2, folder / "config.json").code}) == 4


def test_nothing_is_printed(transformers, tmp_path, data, capfd):
    config = _config(transformers, "bert", vocab_size=13)
    folder = _folder(tmp_path, config, tokenizer=_tokenizer(transformers), model=transformers.BertModel(config))
    capfd.readouterr()
    task = adapt(SST2, folder)
    _built(task, data)
    assert capfd.readouterr() == ("", "")
    logging = transformers.utils.logging
    assert logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == logging.WARNING


def test_gpt_2_is_pruned_and_its_flops_are_counted():
    """Its linear layers are of a class of their own, with transposed weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    sparsifier = niwaki.Sparsifier(model, niwaki.method("static_erk", sparsity=0.5), total_steps=1)
    names = {name.rpartition("h.0.")[2] for name in sparsifier.masks}
    assert names == {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    counted = {layer.name: layer.dense for layer in forward_flops(model, (torch.zeros(1, 16, dtype=torch.long),)).layers}
    assert counted["transformer.h.0.mlp.c_fc.weight"] == 2 * 16 * 8 * 32
