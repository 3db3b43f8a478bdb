import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from niwaki.errors import InputError
from niwaki.tasks.files import check_labels, read_bytes, read_cifar10, read_idx, required

CODES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}


def idx(values: np.ndarray) -> bytes:
    """The bytes of an IDX file, element by element."""
    letter = {"uint8": "B", "int8": "b", "int16": "h", "int32": "i", "float32": "f", "float64": "d"}[values.dtype.name]
    header = bytes([0, 0, CODES[values.dtype.name], values.ndim]) + b"".join(struct.pack(">I", size) for size in values.shape)
    return header + b"".join(struct.pack(f">{letter}", value) for value in values.reshape(-1).tolist())


def refused(read, path: Path) -> str:
    with pytest.raises(InputError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (2, 3, 2, 1)])
@pytest.mark.parametrize("dtype", CODES)
def test_idx_gives_back_what_was_written(tmp_path, dtype, shape, pack):
    values = (np.random.default_rng(0).random(shape) * 100 - (0 if dtype == "uint8" else 50)).astype(dtype)
    path = tmp_path / "file"
    path.write_bytes(pack(idx(values)))
    found = read_idx(path)
    assert str(found.dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(found.numpy(), values)
    found[0] = 1  # the memory is the reader's own


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_an_idx_file_cut_short_or_made_longer_is_refused(tmp_path, pack):
    whole = pack(idx(np.arange(6, dtype=np.uint8).reshape(2, 3)))
    path = tmp_path / "file"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(read_idx, path)
    path.write_bytes(whole + b"x")
    refused(read_idx, path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not an IDX file: it begins with nothing; expected 00 00, a data type (08 = uint8"),
        (b"PNG!" + bytes(20), "not an IDX file: it begins with 50 4e 47 21"),
        (bytes([0, 0, 10, 1]) + bytes(4), "not an IDX file: it begins with 00 00 0a 01"),
        (bytes([0, 0, 8, 0]), "not an IDX file: it begins with 00 00 08 00"),
        (bytes([0, 0, 8, 3, 0, 0]), "an IDX header of 3 dimensions: 16 bytes expected, 6 found"),
        (bytes([0, 0, 8, 1]) + bytes(4), "its header says 0 uint8, which is nothing"),
        (
            bytes([0, 0, 8, 3]) + struct.pack(">III", 60000, 28, 28) + b"x" * 12,
            "its header says 60000 × 28 × 28 uint8: 47,040,016 bytes expected, 28 found",
        ),
        (bytes([0, 0, 14, 32]) + b"\xff" * 128, "bytes expected, 132 found"),
        (b"\x1f\x8bgarbage", "a damaged gzip file ("),
        (gzip.compress(idx(np.arange(9, dtype=np.uint8)))[:-9], "a damaged gzip file (Compressed file ended"),
    ],
)
def test_what_is_wrong_with_an_idx_file_is_said(tmp_path, content, expected):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert expected in refused(read_idx, path)


def test_a_flipped_bit_in_a_packed_file_is_found(tmp_path):
    packed = bytearray(gzip.compress(idx(np.arange(200, dtype=np.uint8)), mtime=0))
    packed[-6] ^= 1  # of the checksum
    path = tmp_path / "file.gz"
    path.write_bytes(packed)
    assert "a damaged gzip file (CRC check failed" in refused(read_idx, path)


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    assert "cannot be read: Is a directory" in refused(read_bytes, tmp_path)
    assert "cannot be read: No such file" in refused(read_bytes, tmp_path / "none")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_cifar_records_are_the_class_then_red_green_and_blue_rows(tmp_path, pack):
    content = bytes((7 * i + i // 256) % 256 if i % 3073 else i // 3073 + 8 for i in range(2 * 3073))
    path = tmp_path / "batch.bin"
    path.write_bytes(pack(content))
    images, labels = read_cifar10(path)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.uint8)
    assert labels.tolist() == [8, 9]
    expected = [
        [
            [[content[record * 3073 + 1 + channel * 1024 + row * 32 + column] for column in range(32)] for row in range(32)]
            for channel in range(3)
        ]
        for record in range(2)
    ]
    assert images.tolist() == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "a multiple of 3,073 bytes expected (1 for the class, 3,072 for the image), 0 found"),
        (bytes(3073 * 2 - 1), "a multiple of 3,073 bytes expected (1 for the class, 3,072 for the image), 6,145 found"),
        (bytes(3073) + b"\x0b" + bytes(3072), "example 1 (counted from 0) has label 11, 0 to 9 are possible"),
    ],
)
def test_what_is_wrong_with_a_cifar_file_is_said(tmp_path, content, expected):
    path = tmp_path / "batch.bin"
    path.write_bytes(content)
    assert expected in refused(read_cifar10, path)


@pytest.mark.parametrize("wrong", [-1, 5])
def test_labels_must_be_of_the_classes(tmp_path, wrong):
    check_labels(tmp_path, torch.tensor([0, 4, 2]), classes=5)
    labels = torch.tensor([0, 4, wrong, 9])
    message = refused(lambda path: check_labels(path, labels, 5), tmp_path)
    assert message == f": example 2 (counted from 0) has label {wrong}, 0 to 4 are possible"


def test_a_file_is_found_in_its_folder_or_in_the_one_given_plain_or_packed(tmp_path):
    (tmp_path / "mnist").mkdir()
    places = [tmp_path / "mnist/labels", tmp_path / "mnist/labels.gz", tmp_path / "labels", tmp_path / "labels.gz"]
    for place in reversed(places):  # each goes before those that are already there
        place.write_bytes(b"")
        assert required(tmp_path, "mnist/labels", task="mnist", contents="labels") == place


def test_a_missing_file_is_said_to_be_missing_in_a_folder_once(tmp_path):
    with pytest.raises(InputError, match=f" in {re.escape(str(tmp_path))}; ") as error:
        required(tmp_path, "labels", task="mnist", contents="labels")
    assert str(error.value).count(str(tmp_path)) == 1


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        (
            None,
            "task 'mnist': no data folder was given: mnist/labels is needed, with one label an image; --data DIR or NIWAKI_DATA names the",
        ),
        ("none", "none: there is no such folder; --data DIR or NIWAKI_DATA names the folder that holds mnist/labels"),
        ("file", "file: there is no such folder;"),
        ("x" * 300, "x: there is no such folder;"),
        (".", "task 'mnist': there is no labels (nor labels.gz), with one label an image, in "),
        (".", "mnist, nor in "),
        (".", "; --data DIR or NIWAKI_DATA names the folder"),
    ],
)
def test_a_missing_file_says_where_it_was_expected_and_what_it_holds(tmp_path, folder, expected):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "labels").mkdir()  # a folder is no file
    with pytest.raises(InputError) as error:
        required(folder and tmp_path / folder, "mnist/labels", task="mnist", contents="one label an image")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
