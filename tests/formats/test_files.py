"""A file appears whole or not at all, and damaged files are refused."""

import errno
import json
import os
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from niwaki.errors import InputError, NiwakiError
from niwaki.formats import Loaded, load, save


def example(path: Path) -> bytes:
    """A file with every feature: masks, a bitmap without mask, dense tensors, tied names, an empty and a single one."""
    keep = torch.arange(26).reshape(2, 13) % 3 == 1
    weight = torch.linspace(-1, 1, 26).reshape(2, 13).masked_fill_(~keep, 0)
    bias = torch.tensor([1.0, -0.0, 3.0]).bfloat16()
    state = {
        "fc.weight": weight,
        "fc.bias": bias,
        "tied.weight": weight,
        "zeros": torch.zeros(60, dtype=torch.float64),
        "seen": torch.tensor([True, False]),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 2),
    }
    save(state, path, masks={"fc.weight": keep, "fc.bias": torch.tensor([True, True, True])})
    return path.read_bytes()


def contents(loaded: Loaded) -> dict[str, Any]:
    def bits(tensor: Tensor) -> Any:
        return str(tensor.dtype), tuple(tensor.shape), bytes(tensor.reshape(-1).view(torch.uint8).tolist())

    return {"tensors": {n: bits(t) for n, t in loaded.tensors.items()}, "masks": {n: bits(t) for n, t in loaded.masks.items()}}


# -- writing -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["missing/file", "a_file/file", ".", "a_folder", "a\0b", "x" * 300])
def test_a_path_that_cannot_be_written_is_one_line(tmp_path: Path, where: str) -> None:
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "a_file").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        save({"w": torch.ones(3)}, f"{tmp_path}/{where}")
    assert "\n" not in str(caught.value)
    assert where in str(caught.value) or "\0" in where
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
        save({"w": torch.ones(3)}, tmp_path / "file")


def test_a_device_is_not_replaced() -> None:
    with pytest.raises(InputError, match="/dev/null: cannot be written: it is a device"):
        save({"w": torch.ones(3)}, "/dev/null")


def test_running_out_of_room_half_way_keeps_the_old_file(tmp_path: Path) -> None:
    old = example(tmp_path / "file")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(NiwakiError, match="file: cannot be written: File too large") as caught:
            save({"w": torch.ones(1_000_000)}, tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not isinstance(caught.value, InputError)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == old


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("raised", "expected"), [(OSError(errno.ENOSPC, "No space"), NiwakiError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_failure_at_the_end_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, raised: BaseException, expected: type[BaseException]
) -> None:
    old = example(tmp_path / "file")

    def fail(*_: object) -> None:
        assert len(os.listdir(tmp_path)) == 2
        raise raised

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(expected):
        save({"w": torch.ones(10)}, tmp_path / "file")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == old


def test_the_bytes_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        order.append(f"sync {os.fstat(descriptor).st_size if not os.path.isdir(f'/proc/self/fd/{descriptor}') else 'folder'}")
        real_sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        assert source.parent == target.parent
        order.append(f"replace {os.stat(source).st_size}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    save({"w": torch.ones(10)}, tmp_path / "file")
    size = (tmp_path / "file").stat().st_size
    assert order == [f"sync {size}", f"replace {size}", "sync folder"]


def test_permissions_and_links_are_those_of_an_ordinary_write(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    save({"w": torch.ones(1)}, tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode == ordinary.stat().st_mode
    (tmp_path / "new").chmod(0o640)
    (tmp_path / "link").symlink_to("new")
    save({"w": torch.zeros(1)}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    assert load(tmp_path / "new").tensors["w"].tolist() == [0]


def test_every_component_is_aligned(tmp_path: Path) -> None:
    data = example(tmp_path / "file")
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__")
    widths = {"F64": 8, "F32": 4, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1}
    assert all((8 + size + entry["data_offsets"][0]) % widths[entry["dtype"]] == 0 for entry in header.values())


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    assert example(tmp_path / "one") == example(tmp_path / "two")


# -- damage --------------------------------------------------------------------------------------------------------------------


def assert_refused_or_unchanged(path: Path, data: bytes, expected: dict[str, Any]) -> bool:
    path.touch()
    with open(path, "r+b") as file:  # opening for "w" is slow on some file systems, and this is done thousands of times
        file.write(data)
        file.truncate()
    message = ""
    try:
        loaded = load(path)
    except InputError as error:
        message = str(error)
    if message:
        assert "\n" not in message
        assert message.startswith(f"{path}: ")
        return True
    assert contents(loaded) == expected
    return False


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = example(tmp_path / "file")
    expected = contents(load(tmp_path / "file"))
    assert all(assert_refused_or_unchanged(tmp_path / "cut", data[:size], expected) for size in range(len(data)))


def test_a_flipped_bit_in_any_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    data = example(tmp_path / "file")
    expected = contents(load(tmp_path / "file"))
    refused = sum(
        assert_refused_or_unchanged(tmp_path / "flipped", data[:i] + bytes([data[i] ^ 1 << i * 5 % 8]) + data[i + 1 :], expected)
        for i in range(len(data))
    )
    assert refused > 0.98 * len(data)  # harmless: the padding, and "format": "pt"


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_random_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    original = (folder / "original").read_bytes() if (folder / "original").exists() else example(folder / "original")
    expected = contents(load(folder / "original"))
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        kind = data.draw(st.sampled_from(["set", "delete", "insert", "copy"]))
        if kind == "set":
            damaged[place] = data.draw(st.sampled_from([*b'0123456789"{}[],:\\-\0\xff ']) | st.integers(0, 255))
        elif kind == "delete":
            del damaged[place : place + data.draw(st.integers(1, 30))]
        elif kind == "insert":
            damaged[place:place] = data.draw(st.binary(min_size=1, max_size=10))
        else:
            other = data.draw(st.integers(0, len(original)))
            damaged[place : place + 20] = original[other : other + 20]
        damaged = damaged or bytearray(1)
    assert_refused_or_unchanged(folder / "damaged", bytes(damaged), expected)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"{}", b"\xff" * 100, b"not a safetensors file at all", b"PK\3\4" + b"\0" * 100])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=r"file: not a valid safetensors file: [^\n]*$"):
        load(tmp_path / "file")


@pytest.mark.parametrize(("where", "message"), [("none", "No such file"), (".", "Is a directory"), ("a\0b", "null character")])
def test_a_path_that_cannot_be_read_is_one_line(tmp_path: Path, where: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(f"{tmp_path}/{where}")


# -- files that are well-formed and wrong --------------------------------------------------------------------------------------


def craft(path: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Rewrite the example with an edited description and edited components; check sums of the edited are made right."""
    example(path)
    with safetensors.safe_open(path, framework="pt") as file:
        components = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        description = json.loads(file.metadata()["niwaki"])
    del description["crc32"]
    edit(description, components)
    for name, tensor in components.items():
        owner, _, part = name.partition("::")
        tensors = description["tensors"]
        sums = tensors[owner]["crc32"] if owner in tensors else None
        if isinstance(sums, dict) and (part or "values") in sums:
            sums[part or "values"] = zlib.crc32(bytes(tensor.reshape(-1).view(torch.uint8).tolist()))
    body = json.dumps(description)[:-1]
    safetensors.torch.save_file(components, path, {"niwaki": f'{body},"crc32":{zlib.crc32(body.encode())}}}'})


def entry(**fields: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], object]:
    return lambda description, components: description["tensors"]["fc.weight"].update(fields)


def field(**fields: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], object]:
    return lambda description, components: description.update(fields)


def part(name: str, tensor: Tensor) -> Callable[[dict[str, Any], dict[str, Tensor]], object]:
    return lambda description, components: components.update({name: tensor})


ones = torch.ones(4, dtype=torch.uint8)

WRONG = [
    (field(version=2), "version 2 of the format, this Niwaki reads version 1"),
    (field(version="1"), "version '1' of the format"),
    (field(version=True), "version True of the format"),
    (field(format="other"), "format 'niwaki'"),
    (field(extra=1), "wrong at 'extra'"),
    (field(tensors=[]), "wrong at 'tensors'"),
    (field(tied={"x": "nothing"}), "'x': tied to 'nothing'"),
    (field(tied={"fc.bias": "fc.weight"}), "'fc.bias': tied to 'fc.weight'"),
    (field(tied={"module.x": "fc.weight"}), "'module.x' has the prefix of a wrapper"),
    (field(tied={"x": 1}), "wrong at 'tied' 'x'"),
    (entry(encoding="csr"), "'fc.weight': unknown encoding 'csr'; known are dense, bitmap"),
    (entry(encoding="dense"), "'fc.weight': a masked tensor needs an encoding with positions"),
    (entry(encoding=1), "wrong at 'tensors' 'fc.weight' 'encoding'"),
    (entry(dtype="F4"), "'fc.weight': unknown data type 'F4'"),
    (entry(dtype="I32"), "'fc.weight::values' has data type F32, the description says I32"),
    (entry(masked=1), "wrong at 'tensors' 'fc.weight' 'masked'"),
    (entry(more=1), "wrong at 'tensors' 'fc.weight' 'more'"),
    (entry(crc32={"values": 1}), "'fc.weight': check sums of"),
    (entry(shape=[2, 13.0]), "wrong at 'tensors' 'fc.weight' 'shape' 1"),
    (entry(shape=[2, True]), "wrong at 'tensors' 'fc.weight' 'shape' 1"),
    (entry(shape=[-2, -13]), r"'fc.weight': the shape \[-2, -13\] is no shape"),
    (entry(shape=[2**62, 2**62]), "'fc.weight': the shape .* is no shape"),
    (entry(shape=[0, 2**70]), "'fc.weight': the shape .* is no shape"),
    (entry(shape=[2**50]), r"'fc.weight': shape \[1125899906842624\] needs 140737488355328 bytes"),
    (entry(shape=[2, 12]), r"'fc.weight': shape \[2, 12\] needs 3 bytes of packed bits, got torch.uint8 of shape \[4\]"),
    (entry(shape=[25]), "'fc.weight': packed bits are set beyond the 25 elements"),
    (part("fc.weight::values", torch.ones(8)), "'fc.weight': 9 positions need as many values in one dimension, got shape"),
    (part("fc.weight::values", torch.ones(10)), "'fc.weight': 9 positions need as many values"),
    (part("fc.weight::values", torch.ones(3, 3)), "'fc.weight': 9 positions need as many values in one dimension"),
    (part("fc.weight::values", torch.ones(9).double()), "'fc.weight::values' has data type F64, the description says F32"),
    (part("fc.weight::positions", ones), "'fc.weight': 4 positions need as many values"),
    (part("fc.weight::positions", ones * 255), "'fc.weight': packed bits are set beyond the 26 elements"),
    (part("fc.weight::positions", ones.char()), "'fc.weight::positions' has data type I8"),
    (part("fc.weight::positions", ones.reshape(2, 2)), "'fc.weight': .* got torch.uint8 of shape"),
    (part("stranger", torch.ones(1)), "'stranger' is not in the niwaki description"),
    (part("seen", torch.tensor([1], dtype=torch.uint8)), "'seen' has data type U8, the description says BOOL"),
    (part("count", torch.tensor([7])), r"'count': stored with shape \[1\], the description says \[\]"),
    (lambda description, components: components.pop("fc.weight::values"), "'fc.weight': its component 'fc.weight::values' is missing"),
    (lambda description, components: components.pop("count"), "'count': its component 'count' is missing"),
    (lambda description, components: description["tensors"].pop("count"), "'count' is not in the niwaki description"),
]


def test_the_crafted_example_is_right_before_it_is_made_wrong(tmp_path: Path) -> None:
    expected = contents(load_example(tmp_path))
    craft(tmp_path / "file", lambda description, components: None)
    assert contents(load(tmp_path / "file")) == expected


def load_example(folder: Path) -> Loaded:
    example(folder / "file")
    return load(folder / "file")


@pytest.mark.parametrize(("edit", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_every_rule_of_the_format_is_checked(tmp_path: Path, edit: Callable[..., object], message: str) -> None:
    craft(tmp_path / "file", edit)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path / "file")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'file'}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "not a JSON object with format 'niwaki'"),
        ("[" * 100_000, "not valid JSON"),
        ("9" * 10_000, "not valid JSON"),
        ('{"format":"niwaki","format":"niwaki"}', "not valid JSON: 'format' stands twice"),
        ('{"format":"niwaki","version":1,"tensors":{},"tied":{}}', "damaged: its check sum does not fit"),
        ('{"format":"niwaki","version":1,"tensors":{},"tied":{},"crc32":1}', "damaged: its check sum does not fit"),
    ],
)
def test_a_wrong_description_is_refused(tmp_path: Path, text: str, message: str) -> None:
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "file", {"niwaki": text})
    with pytest.raises(InputError, match=f"file: the niwaki description is {message}") as caught:
        load(tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_a_description_under_a_damaged_name_is_refused(tmp_path: Path) -> None:
    weight = torch.ones(3)
    save({"w": weight, "tied": weight}, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(data.replace(b'"niwaki":', b'"njwaki":'))
    with pytest.raises(InputError, match="file: a niwaki description stands under another name"):
        load(tmp_path / "file")


def raw(path: Path, header: str, data: bytes) -> Path:
    path.write_bytes(struct.pack("<Q", len(header.encode())) + header.encode() + data)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "'a' stands twice"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "not a valid safetensors file"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "not a valid safetensors file"),
        ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "not a valid safetensors file"),
        ('{"a":{"dtype":"BOOL","shape":[4],"data_offsets":[0,4]}}', "'a' has bytes other than 0 and 1"),
        ('{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}', "'a' has data type F4, known are"),
        ('{"a::values":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "'a::values' is part of an encoded tensor"),
        (
            '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[4,4]}}',
            "'b'",
        ),
        (
            '{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"module.w":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}',
            "are both 'w' without",
        ),
        ("[" * 50_000, "nested too deeply"),
    ],
)
def test_wrong_plain_files_are_refused(tmp_path: Path, header: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(raw(tmp_path / "file", header, b"\7\0\0\0"))
    assert "\n" not in str(caught.value)
