import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from niwaki.errors import InputError
from niwaki.metrics import forward_flops
from niwaki.tasks import Data, Task
from niwaki.tasks.images import CIFAR10, CIFAR_SCALE, FASHION_MNIST, MNIST, Images, Scale, crop_and_flip

TASKS = {"mnist": MNIST, "fashion_mnist": FASHION_MNIST, "cifar10": CIFAR10}
FOLDERS = {"mnist": "mnist", "fashion_mnist": "fashion-mnist", "cifar10": "cifar-10-batches-bin"}


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(name: str, folder: Path, suffix: str = "") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write a tiny data set as it is distributed; return what is in each part."""
    folder.mkdir(parents=True, exist_ok=True)

    def store(path: str, content: bytes) -> None:
        (folder / f"{path}{suffix}").write_bytes(gzip.compress(content) if suffix else content)

    if name == "cifar10":
        parts = {file: (pixels(seed, 4, 3, 32, 32), (np.arange(4) + seed) % 10) for seed, file in enumerate(("test_batch", *BATCHES))}
        for file, (images, labels) in parts.items():
            store(f"{file}.bin", b"".join(bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)))
        train = tuple(np.concatenate([parts[file][i] for file in BATCHES]) for i in range(2))
        return {"train": train, "test": parts["test_batch"]}
    parts = {"train": (pixels(0, 12, 28, 28), np.arange(12) % 10), "test": (pixels(1, 5, 28, 28), np.arange(5) + 5)}
    for prefix, (images, labels) in zip(("train", "t10k"), parts.values(), strict=True):
        store(f"{prefix}-images-idx3-ubyte", bytes([0, 0, 8, 3]) + struct.pack(">III", *images.shape) + images.tobytes())
        store(f"{prefix}-labels-idx1-ubyte", bytes([0, 0, 8, 1]) + struct.pack(">I", len(labels)) + labels.astype(np.uint8).tobytes())
    return {part: (images[:, None], labels) for part, (images, labels) in parts.items()}


BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
MEANS = {"mnist": [0.1307], "fashion_mnist": [0.2860], "cifar10": [0.485, 0.456, 0.406]}
DEVIATIONS = {"mnist": [0.3081], "fashion_mnist": [0.3530], "cifar10": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", TASKS)
def test_every_image_comes_with_its_class_scaled_as_usual(tmp_path, name, suffix):
    parts = write(name, tmp_path / FOLDERS[name], suffix)
    data = TASKS[name].data(tmp_path)
    for part, (images, labels) in parts.items():
        examples = getattr(data, part)
        assert len(examples) == len(labels)
        some = [3, 0, 3]
        inputs, targets = examples[torch.tensor(some)]
        assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
        mean, deviation = (np.array(values[name]).reshape(1, -1, 1, 1) for values in (MEANS, DEVIATIONS))
        np.testing.assert_allclose(inputs.numpy(), (images[some] / 255 - mean) / deviation, rtol=1e-5, atol=1e-6)
        assert targets.tolist() == labels[some].tolist()
        np.testing.assert_array_equal(examples.tensors[0].numpy(), images)  # and the bytes are untouched by it
    assert [len(data.classes), len(set(data.classes))] == [10, 10]


@pytest.mark.parametrize("name", TASKS)
def test_the_innermost_folder_will_do_and_makes_the_same_data(tmp_path, name):
    write(name, tmp_path / FOLDERS[name])
    outer, inner = TASKS[name].data(tmp_path), TASKS[name].data(tmp_path / FOLDERS[name])
    assert outer.fingerprint() == inner.fingerprint()
    outer.train.tensors[0][0, 0, 0, 0] ^= 1
    assert outer.fingerprint() != inner.fingerprint()


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("folder", [None, "."])
def test_missing_files_are_named(tmp_path, name, folder):
    with pytest.raises(InputError, match=f"^task {name!r}: .*{FOLDERS[name]}.*NIWAKI_DATA"):
        TASKS[name].data(folder and tmp_path)


def test_each_file_is_needed(tmp_path):
    for name, task in TASKS.items():
        write(name, tmp_path / name)
        for file in sorted((tmp_path / name).iterdir()):
            content = file.read_bytes()
            file.unlink()
            with pytest.raises(InputError, match=file.name):
                task.data(tmp_path / name)
            file.write_bytes(content)
        task.data(tmp_path / name)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        (
            "train-images-idx3-ubyte",
            bytes([0, 0, 8, 3]) + struct.pack(">III", 1, 20, 28) + bytes(560),
            "N × 28 × 28 uint8 expected, 1 × 20 × 28 ",
        ),
        ("train-images-idx3-ubyte", bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0]), "N × 28 × 28 uint8 expected, 1 × 1 uint8 found"),
        (
            "train-images-idx3-ubyte",
            bytes([0, 0, 13, 3]) + struct.pack(">III", 1, 28, 28) + bytes(4 * 784),
            "uint8 expected, 1 × 28 × 28 float32 f",
        ),
        ("train-labels-idx1-ubyte", bytes([0, 0, 9, 1, 0, 0, 0, 1, 0]), "N uint8 expected, 1 int8 found"),
        ("train-labels-idx1-ubyte", bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0]), "N uint8 expected, 1 × 1 uint8 found"),
        ("train-labels-idx1-ubyte", bytes([0, 0, 8, 1, 0, 0, 0, 11]) + bytes(11), "11 labels for the 12 images of train-images-idx3-ubyte"),
        (
            "t10k-labels-idx1-ubyte",
            bytes([0, 0, 8, 1, 0, 0, 0, 5, 0, 1, 2, 11, 12]),
            "example 3 (counted from 0) has label 11, 0 to 9 are possible",
        ),
        ("t10k-labels-idx1-ubyte", b"<html>", "not an IDX file"),
    ],
)
def test_damaged_files_are_named_with_what_was_expected(tmp_path, file, content, expected):
    write("mnist", tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError) as error:
        MNIST.data(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / file}: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "model", "parameters"),
    [
        ("mnist", "lenet_300_100", 266_610),
        ("fashion_mnist", "lenet_5", 431_080),
        ("cifar10", "resnet20", 269_722),
        ("cifar10", "resnet56", 853_018),
        ("cifar10", "resnet8", 9 * (3 * 16 + 2 * 16**2 + 16 * 32 + 32**2 + 32 * 64 + 64**2) + 2 * (3 * 16 + 2 * 32 + 2 * 64) + 650),
        ("cifar10", "vgg_small", 9 * 508_288 + 4 * 896 + 81_930),
    ],
)
def test_models_fit_the_data(tmp_path, name, model, parameters):
    task: Task = TASKS[name]
    write(name, tmp_path)
    data = task.data(tmp_path)
    network = task.build(model, data, seed=0)
    assert sum(p.numel() for p in network.parameters()) == parameters
    example = task.example(data)
    assert [tuple(part.shape) for part in example] == [(1, *data.test.tensors[0].shape[1:])]
    assert forward_flops(network, example).dense > parameters  # every weight is used at least once
    inputs, targets = data.test[torch.arange(4)]
    loss = task.loss(network(inputs), targets)
    loss.backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(("name", "first"), [("mnist", "lenet_300_100"), ("fashion_mnist", "lenet_300_100"), ("cifar10", "resnet20")])
def test_default_models(name, first):
    assert TASKS[name].model()[0] == first


@pytest.mark.parametrize("name", TASKS)
def test_metrics_are_accuracy_and_cross_entropy(name):
    assert next(iter(TASKS[name].metrics)) == "accuracy"
    scores, targets = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]], dtype=torch.float64), torch.tensor([1, 2])
    assert TASKS[name].metrics["accuracy"].values(scores, targets).tolist() == [True, False]
    expected = np.log(np.exp(scores.numpy()).sum(1)) - scores.numpy()[[0, 1], targets]
    np.testing.assert_allclose(TASKS[name].metrics["loss"].values(scores, targets).numpy(), expected, rtol=1e-12)
    assert TASKS[name].loss(scores, targets).item() == pytest.approx(expected.mean(), rel=1e-12)


def crops(image: np.ndarray, black: np.ndarray, padding: int) -> dict[bytes, tuple[int, int, bool]]:
    """Every image that a crop and a flip may make of this one, by its bytes."""
    channels, height, width = image.shape
    padded = np.empty((channels, height + 2 * padding, width + 2 * padding), image.dtype)
    padded[:] = black.reshape(-1, 1, 1)
    for row in range(height):
        for column in range(width):
            padded[:, padding + row, padding + column] = image[:, row, column]
    made = {}
    for down in range(2 * padding + 1):
        for right in range(2 * padding + 1):
            cut = padded[:, down : down + height, right : right + width]
            made[cut.tobytes()] = (down, right, False)
            made[np.ascontiguousarray(cut[:, :, ::-1]).tobytes()] = (down, right, True)
    return made


def test_each_image_is_cropped_and_flipped_on_its_own_uniformly():
    count, padding = 4000, 2
    one = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))
    out = crop_and_flip(one.repeat(count, 1, 1, 1), torch.Generator().manual_seed(0), padding=padding)
    black = ((0 - np.array(MEANS["cifar10"])) / np.array(DEVIATIONS["cifar10"])).astype(np.float32)
    np.testing.assert_allclose(CIFAR_SCALE.black.flatten().numpy(), black, rtol=1e-6)
    possible = crops(one.numpy(), CIFAR_SCALE.black.numpy(), padding)
    found = [possible[image.numpy().tobytes()] for image in out]  # a KeyError: it is none of them
    assert len(possible) == 50
    counts = np.unique(np.array(found), axis=0, return_counts=True)[1]
    assert len(counts) == 50
    chi_squared = ((counts - count / 50) ** 2 / (count / 50)).sum()
    assert chi_squared < 94.6  # 49 degrees of freedom: exceeded with probability 1e-4


def test_images_of_a_batch_are_not_mixed():
    batch = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    out = crop_and_flip(batch, torch.Generator().manual_seed(0), padding=1)
    for image, made in zip(batch, out, strict=True):
        assert made.numpy().tobytes() in crops(image.numpy(), CIFAR_SCALE.black.numpy(), 1)


def test_the_generator_decides_and_nothing_else_is_touched():
    inputs = torch.randn(8, 3, 32, 32)
    before, state = inputs.clone(), torch.random.get_rng_state()
    first, same, other = (crop_and_flip(inputs, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.shape == inputs.shape
    assert first.is_contiguous()
    assert torch.equal(inputs, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert CIFAR10.augment is crop_and_flip
    assert MNIST.augment is None


def test_images_are_examples_for_data():
    images = Images(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 2], dtype=torch.uint8), Scale((0.5,), (0.5,)))
    assert len(Data(images, images).fingerprint()) == 64
    assert images[torch.tensor([2])][0].tolist() == [[[[-1, -1], [-1, -1]]]]
