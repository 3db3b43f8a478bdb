import pytest
import torch
from torch import nn

from niwaki.errors import InputError
from niwaki.target import Weights, select_targets
from niwaki.tasks.sentences import SENTENCES, SST2, Words, read_tsv, sentence_task
from niwaki.tasks.text_networks import Encoder

TRAIN = 'A fine film\t1\nnot a fine Film at all\t0\na "bad\t0\nbad bad\t0\n<pad> <pad> fine\t1\n'
DEV = "a splendid film\t1\nnot a fine film at all , not at all\t0\n"


def _write(folder, train=TRAIN, dev=DEV, header="sentence\tlabel\n"):
    folder.mkdir(exist_ok=True)
    (folder / "train.tsv").write_text(header + train, encoding="utf-8", newline="")
    (folder / "dev.tsv").write_text(header + dev, encoding="utf-8", newline="")
    return folder


def test_words_are_numbered_by_frequency_and_sentences_filled_up_to_the_longest_to_train_on(tmp_path):
    data = SST2.data(_write(tmp_path))
    # twice or more: a 3, fine 3, bad 2, film 2; in the order of frequency, then of the alphabet
    number = {"a": 2, "fine": 3, "bad": 4, "film": 5}
    sentences = ["a fine film", "not a fine film at all", 'a "bad', "bad bad", "<pad> <pad> fine"]
    expected = [[number.get(word, 1) for word in sentence.split()] for sentence in sentences]
    assert data.train.tensors[0].tolist() == [row + [0] * (6 - len(row)) for row in expected]
    assert data.train.tensors[1].tolist() == [1, 0, 0, 0, 1]
    assert data.test.tensors[0].tolist() == [[2, 1, 5, 0, 0, 0], [1, 2, 3, 5, 1, 1]]
    assert data.test.tensors[1].tolist() == [1, 0]
    assert data.facts == {"vocabulary": 6, "padding": 0, "length": 6}
    assert data.classes == ("negative", "positive")


def test_a_limit_cuts_sentences_and_another_tokenizer_pads_with_its_own_token(tmp_path):
    class Lengths:
        size, padding = 50, 9

        def __call__(self, texts, length):
            return [[len(word) for word in text.split()][:length] for text in texts]

    data = SST2.read(_write(tmp_path), Lengths(), 4)
    assert data.train.tensors[0].tolist() == [[1, 4, 4, 9], [3, 1, 4, 4], [1, 4, 9, 9], [3, 3, 9, 9], [5, 5, 4, 9]]
    assert data.facts == {"vocabulary": 50, "padding": 9, "length": 4}


def test_the_files_may_be_in_a_folder_of_their_own(tmp_path):
    _write(tmp_path / "sst2")
    assert len(SST2.data(tmp_path).train) == len(SST2.data(tmp_path / "sst2").train) == 5


def test_other_files_have_numbered_classes_and_may_have_more_columns(tmp_path):
    header = "index\tlabel\tsentence\n"
    rows = "".join(f"{i}\t{i % 3}\tword{i} common\n" for i in range(6))
    data = SENTENCES.data(_write(tmp_path, rows, "0\t2\tcommon\n", header))
    assert data.classes == ("0", "1", "2")
    assert data.train.tensors[1].tolist() == [0, 1, 2, 0, 1, 2]
    assert data.test.tensors[1].tolist() == [2]
    model = SENTENCES.build("encoder", data, seed=0)
    assert model(data.train.tensors[0]).shape == (6, 3)


def test_line_ends_quotes_and_separators_of_other_systems_are_kept_apart(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes('\ufeffsentence\tlabel\r\n"quoted" it\u2028is\x85so\t1\r\n  spaced  \t0'.encode())
    assert read_tsv(path) == [('"quoted" it\u2028is\x85so', 1, 2), ("  spaced  ", 0, 3)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "train.tsv: the file is empty"),
        ("sentence\tlabel\n", "train.tsv: no example follows the header"),
        ("text\tlabel\na\t1\n", "line 1: expected a header with the columns sentence and label, separated by a tab; found 'text', 'label'"),
        ("sentence label\na 1\n", "line 1: expected a header"),
        ("sentence\tlabel\na\t1\nb\n", "line 3: expected 2 columns, as line 1 names them; found 1"),
        ("sentence\tlabel\na\tb\t1\n", "line 2: expected 2 columns, as line 1 names them; found 3"),
        ("sentence\tlabel\na\t1\n\nb\t0\n", "line 3: expected 2 columns"),
        ("sentence\tlabel\na\t1\n \t0\n", "line 3: the sentence is empty"),
        ("sentence\tlabel\na\tpositive\n", "line 2: the label is 'positive'; expected a whole number from 0 on"),
        ("sentence\tlabel\na\t-1\n", "line 2: the label is '-1'"),
        ("sentence\tlabel\na\t0.5\n", "line 2: the label is '0.5'"),
        ("sentence\tlabel\na\t²\n", "line 2: the label is '²'"),
        ("sentence\tlabel\na\t0\nb\t2\n", "train.tsv: line 3: the label is 2; 0 to 1 are possible"),
        ("sentence\tlabel\na\t0\nb\t0\n", "train.tsv: no line has the label 1; every label from 0 to 1 is needed"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it_and_the_line(content, message, tmp_path):
    _write(tmp_path)
    (tmp_path / "train.tsv").write_text(content, encoding="utf-8", newline="")
    with pytest.raises(InputError) as error:
        SST2.data(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path / "train.tsv") in str(error.value)
    assert "\n" not in str(error.value)


def test_labels_that_were_not_trained_on_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"dev.tsv: line 2: the label is 2; 0 to 1 are possible"):
        SENTENCES.data(_write(tmp_path, dev="a\t2\n"))
    with pytest.raises(InputError, match=r"train.tsv: no line has the label 1"):
        SENTENCES.data(_write(tmp_path, train="a\t0\nb\t2\n"))
    with pytest.raises(InputError, match=r"train.tsv: no line has the label 0"):
        SENTENCES.data(_write(tmp_path, train="a\t1\nb\t1\n"))


def test_missing_files_say_where_they_were_expected(tmp_path):
    with pytest.raises(InputError, match="NIWAKI_DATA"):
        SST2.data(None)
    with pytest.raises(InputError, match=r"train\.tsv .*/sst2"):
        SST2.data(tmp_path)


def test_words_of_a_text_that_has_none_twice():
    assert Words.of(["a b"]).vocabulary == ("<pad>", "<unknown>")


def _encoder(**changes):
    torch.manual_seed(0)
    model = Encoder(20, 9, 3, padding=4, width=8, layers=2, heads=2, **changes).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def test_the_encoder_is_torchs_own_followed_by_the_mean_over_tokens():
    model = _encoder()
    tokens = torch.tensor([[1, 2, 3, 5, 4, 4, 4, 4, 4], [7, 0, 9, 8, 1, 2, 3, 5, 6]])
    hidden = tokens == 4
    x = model.embedding.weight[tokens] + model.position.weight[:9]
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(8, 2, 32, activation="gelu", norm_first=True, batch_first=True, dropout=0, dtype=torch.float64)
        packed = {
            "weight": [m.weight for m in (block.query, block.key, block.value)],
            "bias": [m.bias for m in (block.query, block.key, block.value)],
        }
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": torch.cat(packed["weight"]),
                "self_attn.in_proj_bias": torch.cat(packed["bias"]),
                **{
                    f"{theirs}.{kind}": getattr(getattr(block, ours), kind)
                    for theirs, ours in {
                        "self_attn.out_proj": "out",
                        "linear1": "up",
                        "linear2": "down",
                        "norm1": "norm1",
                        "norm2": "norm2",
                    }.items()
                    for kind in ("weight", "bias")
                },
            }
        )
        x = layer.train()(x, src_key_padding_mask=hidden)  # without dropout, and not on the fast path
    x = model.norm(x)
    expected = model.output(torch.stack([x[0, :4].mean(0), x[1].mean(0)]))
    torch.testing.assert_close(model(tokens), expected, rtol=1e-10, atol=1e-12)


def test_padding_changes_nothing():
    model = _encoder()
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(nn.functional.pad(tokens, (0, 6), value=4)), model(tokens), rtol=1e-12, atol=1e-12)


def test_embeddings_and_the_output_layer_stay_dense_by_default(tmp_path):
    data = SST2.data(_write(tmp_path))
    chosen, _ = select_targets(SST2.build("encoder", data, 0), Weights())
    assert {target.name.split(".")[0] for target in chosen} == {"blocks"}
    assert len(chosen) == 2 * 6


def test_a_task_of_ones_own_has_its_name_place_and_classes(tmp_path):
    task = sentence_task("mood", place="moods", classes=("sad", "glad"))
    _write(tmp_path / "moods")
    assert task.data(tmp_path).classes == ("sad", "glad")
    with pytest.raises(InputError, match="'mood'"):
        task.data(None)


def test_the_encoder_learns_from_a_word(tmp_path):
    rows = "".join(f"w{i % 7} {'good' if i % 2 else 'poor'} x{i % 5}\t{i % 2}\n" for i in range(64))
    data = SST2.data(_write(tmp_path, rows, "good w1\t1\npoor w2 x1\t0\n"))
    model = SST2.build("encoder", data, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    inputs, labels = data.train[torch.arange(64)]
    for _ in range(15):
        optimizer.zero_grad()
        SST2.loss(model(inputs), labels).backward()
        optimizer.step()
    inputs, labels = data.test[torch.arange(2)]
    assert SST2.metrics["accuracy"].values(model.eval()(inputs), labels).tolist() == [True, True]
