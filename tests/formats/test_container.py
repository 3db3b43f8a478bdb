"""Round trips of the container file, bit for bit, and what it refuses to store."""

import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from formats.states import assert_same, bits, state_and_masks
from hypothesis import given, settings
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.formats import load, save
from niwaki.formats.container import HEADER_BYTES
from niwaki.masks import Masks


@settings(max_examples=150, deadline=None)
@given(state_and_masks())
def test_every_bit_and_every_mask_survive(
    tmp_path_factory: pytest.TempPathFactory, pair: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    state, masks = pair
    path = tmp_path_factory.getbasetemp() / "round_trip.safetensors"
    save(state, path, masks=masks)
    loaded = load(path)
    assert_same(loaded.tensors, state)
    assert_same(loaded.masks, masks)
    assert list(loaded.tensors) == list(state)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.int64, torch.bool])
def test_the_file_takes_exactly_header_and_bits_and_values(tmp_path: Path, dtype: torch.dtype, density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(61, 67, generator=generator) < density
    weight = torch.ones(61, 67).masked_fill_(~keep, 0).to(dtype)
    path = tmp_path / "file"
    save({"w": weight}, path, masks={"w": keep})
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert len(data) == 8 + header + (61 * 67 + 7) // 8 + int(keep.sum()) * dtype.itemsize
    assert header < 500


def test_an_unmasked_tensor_is_a_bitmap_exactly_when_the_file_gets_smaller(tmp_path: Path) -> None:
    for elements, active in [(4000, 400), (4000, 3999), (4000, 0), (4000, 3900), (30, 0), (0, 0)]:
        weight = torch.zeros(elements)
        weight[:active] = -0.0
        save({"w": weight}, tmp_path / "file")
        with safetensors.safe_open(tmp_path / "file", framework="pt") as file:
            stored = set(file.keys())
            entry = json.loads(file.metadata()["niwaki"])["tensors"]["w"]
        smaller = (elements + 7) // 8 + 4 * active + HEADER_BYTES < 4 * elements
        assert stored == ({"w::positions", "w::values"} if smaller else {"w"})
        assert entry["encoding"] == ("bitmap" if smaller else "dense")
        assert entry["masked"] is False
        loaded = load(tmp_path / "file")
        assert_same(loaded.tensors, {"w": weight})
        assert loaded.masks == Masks()
        safetensors.torch.save_file({"w": weight}, tmp_path / "plain")
        assert (tmp_path / "file").stat().st_size <= (tmp_path / "plain").stat().st_size + 250


def test_masked_is_told_from_zero(tmp_path: Path) -> None:
    keep = torch.tensor([True, True, True, False, False])
    weight = torch.tensor([0.0, -0.0, 1.0, 0.0, -0.0])
    save({"w": weight, "plain": weight.clone()}, tmp_path / "file", masks={"w": keep})
    loaded = load(tmp_path / "file")
    assert_same(loaded.masks, {"w": keep})
    assert bits(loaded.tensors["w"]) == bits(torch.tensor([0.0, -0.0, 1.0, 0.0, 0.0]))  # masked elements are +0.0
    assert bits(loaded.tensors["plain"]) == bits(weight)


@pytest.mark.parametrize("value", [1.0, float("nan"), 1e-45, float("inf")])
def test_nothing_is_pruned_silently(tmp_path: Path, value: float) -> None:
    weight = torch.tensor([[0.0, value], [value, 5.0]])
    keep = torch.tensor([[False, False], [False, True]])
    with pytest.raises(InputError, match=r"file: 'layer.weight': 2 masked elements are not zero, and nothing is pruned silently"):
        save({"layer.weight": weight}, tmp_path / "file", masks={"layer.weight": keep})
    assert not list(tmp_path.iterdir())


class Everything(nn.Module):
    """Tied weights, buffers of odd types, a channels_last and a transposed weight, views of one storage."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.norm = nn.BatchNorm1d(6)
        self.convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.gates = nn.LSTM(6, 5)
        self.head = nn.Linear(6, 9)
        self.head.weight = self.embedding.weight
        self.transposed = nn.Parameter(torch.randn(4, 7).t())
        self.register_buffer("seen", torch.tensor([True, False, True]))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("count", torch.tensor(2**53 + 1))
        self.register_buffer("bfloat", torch.randn(5).bfloat16())
        storage = torch.randn(10)
        self.register_buffer("front", storage[:6])
        self.register_buffer("back", storage[4:])
        self.register_buffer("expanded", torch.ones(1).expand(5))
        self.register_buffer("imaginary", torch.randn(3, dtype=torch.complex64).conj())
        self.register_buffer("not_saved", torch.ones(1), persistent=False)


def test_a_whole_model_and_back(tmp_path: Path) -> None:
    model = Everything()
    masks = Masks({name: torch.rand(p.shape) < 0.3 for name, p in model.named_parameters() if p.dim() > 1})
    masks.apply_(model)
    path = tmp_path / "model.safetensors"
    save(model, path, masks=masks)
    expected = {name: tensor.resolve_conj() for name, tensor in model.state_dict().items()}

    loaded = load(path)
    assert_same(loaded.tensors, expected)
    assert_same(loaded.masks, masks)
    assert loaded.masks == masks
    assert loaded.masks.hash() == masks.hash()
    assert loaded.tensors["head.weight"] is loaded.tensors["embedding.weight"]
    with safetensors.safe_open(path, framework="pt") as file:
        assert not any(name.startswith("head.weight") for name in file.keys())  # noqa: SIM118

    other = Everything()
    other.get_parameter("transposed").requires_grad_(False)
    other.expanded = torch.zeros(5)
    assert load(path, other).masks == masks
    assert_same({name: tensor.resolve_conj() for name, tensor in other.state_dict().items()}, expected)
    assert other.head.weight is other.embedding.weight
    assert not other.transposed.requires_grad


def test_what_is_loaded_is_independent_of_the_file_and_of_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save({"a": torch.ones(3), "b": torch.ones(3)}, path)
    loaded = load(path)
    loaded.tensors["a"].zero_()
    assert load(path).tensors["a"].tolist() == loaded.tensors["b"].tolist() == [1, 1, 1]
    path.write_bytes(b"")
    assert loaded.tensors["b"].tolist() == [1, 1, 1]
    assert loaded.tensors["b"].untyped_storage().nbytes() == 12


def test_saving_over_the_file_one_loaded_from(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save({"w": torch.arange(1000.0)}, path)
    for _ in range(3):
        save(load(path).tensors, path)
    assert load(path).tensors["w"].tolist() == list(range(1000))


def test_wrapped_models_exchange_files_with_bare_ones(tmp_path: Path) -> None:
    def wraps(model: nn.Module) -> list[nn.Module]:
        return [model, torch.compile(model), nn.DataParallel(model), nn.DataParallel(torch.compile(model))]

    for source in wraps(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))):
        masks = {name: torch.rand(p.shape) < 0.5 for name, p in source.named_parameters() if p.dim() == 2}
        Masks(masks).apply_(source)
        save(source, tmp_path / "file", masks=masks)
        assert list(load(tmp_path / "file").tensors) == list(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict())
        for target in wraps(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))):
            assert load(tmp_path / "file", target).masks == Masks(masks)
            for found, expected in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
                assert torch.equal(found, expected)


def test_a_plain_safetensors_file_loads_as_dense(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3, bias=False))
    model[1].weight = nn.Parameter(torch.zeros(3, 4))
    safetensors.torch.save_file(
        {f"module.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "plain", {"format": "pt"}
    )
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.ones_(parameter)
    loaded = load(tmp_path / "plain", other)
    assert len(loaded.masks) == 0
    assert_same(loaded.tensors, model.state_dict())
    assert_same(other.state_dict(), model.state_dict())


def test_a_file_that_has_one_of_two_tied_names_fills_both(tmp_path: Path) -> None:
    model, other = tied_model(), tied_model()
    safetensors.torch.save_model(model, str(tmp_path / "plain"))
    assert len(safetensors.torch.load_file(tmp_path / "plain")) == 1
    load(tmp_path / "plain", other)
    assert_same(other.state_dict(), model.state_dict())


def test_other_tools_read_the_dense_tensors(tmp_path: Path) -> None:
    save({"w": torch.randn(3), "v": torch.tensor(1.5, dtype=torch.float64)}, tmp_path / "file")
    found = safetensors.torch.load_file(tmp_path / "file")
    assert_same(found, load(tmp_path / "file").tensors)
    with safetensors.safe_open(tmp_path / "file", framework="np") as file:
        assert file.metadata()["format"] == "pt"
        assert file.get_tensor("v") == 1.5


# -- tied weights --------------------------------------------------------------------------------------------------------------


def tied_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("masked_name", ["0.weight", "1.weight"])
def test_a_mask_under_either_tied_name_comes_back_under_it(tmp_path: Path, masked_name: str) -> None:
    model = tied_model()
    masks = Masks({masked_name: torch.eye(4) > 0})
    masks.apply_(model)
    save(model, tmp_path / "file", masks=masks)
    loaded = load(tmp_path / "file", tied_model())
    assert loaded.masks == masks
    assert_same(loaded.tensors, model.state_dict())


def test_masks_under_both_tied_names_are_refused(tmp_path: Path) -> None:
    keep = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(InputError, match=r"'0.weight' and '1.weight' are one tied tensor"):
        save(tied_model(), tmp_path / "file", masks={"0.weight": keep, "1.weight": keep})


def test_two_tensors_for_one_tied_weight_are_refused(tmp_path: Path) -> None:
    save({"0.weight": torch.ones(4, 4), "1.weight": torch.zeros(4, 4)}, tmp_path / "file")
    with pytest.raises(InputError, match=r"'0.weight' and '1.weight' are one tied tensor in the model, but differ in the file"):
        load(tmp_path / "file", tied_model())
    save({"0.weight": torch.ones(4, 4), "1.weight": torch.ones(4, 4)}, tmp_path / "file")
    model = tied_model()
    load(tmp_path / "file", model)
    assert model[1].weight.sum() == 16


# -- what does not fit ---------------------------------------------------------------------------------------------------------


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: object) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("model", "masks", "message"),
    [
        (WithExtraState(2, 2), None, "'_extra_state' is of type dict; a file holds tensors only"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, None, "'w' has the data type torch.complex128"),
        ({"w": torch.eye(3).to_sparse()}, None, "'w' has the layout torch.sparse_coo"),
        ({"w": torch.ones(2, device="meta")}, None, "'w' is on the meta device"),
        (nn.LazyLinear(3), None, "'weight' has no shape yet; run the model once"),
        ({"a::b": torch.ones(1)}, None, "'a::b' is reserved"),
        ({"__metadata__": torch.ones(1)}, None, "'__metadata__' is reserved"),
        ({"\ud800": torch.ones(1)}, None, "is not valid Unicode"),
        ({3: torch.ones(1)}, None, "the name 3 is not a string"),
        ({"w": torch.ones(1), "module.w": torch.ones(1)}, None, "'w' and 'module.w' are both 'w' without wrapper prefixes"),
        ([torch.ones(1)], None, "expected a model or a state dict, got list"),
        (nn.Linear(2, 2), {"weigth": torch.ones(2, 2) > 0}, "masks: 'weigth' is not a tensor of the model; did you mean 'weight'"),
        (nn.Linear(2, 3), {"weight": torch.ones(2, 3) > 0}, r"'weight' has a mask of shape \[2, 3\], the tensor has shape \[3, 2\]"),
        (nn.Linear(2, 2), {"weight": torch.ones(2, 2)}, "'weight' must be a bool tensor"),
    ],
)
def test_what_cannot_be_stored_is_refused_in_one_line(
    tmp_path: Path, model: nn.Module, masks: dict[str, Tensor] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        save(model, tmp_path / "file", masks=masks)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Linear(3, 5)),
            r"'0.weight' is torch.float32 of shape \[4, 3\] in the file and torch.float32 of shape \[5, 3\] in",
        ),
        (nn.Sequential(nn.Linear(3, 4).double()), r"'0.weight' is torch.float32 of shape \[4, 3\] in the file and torch.float64"),
        (nn.Sequential(nn.Linear(3, 4, bias=False)), r"1 of its tensors are not in the model, such as '0.bias'"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), r"'1.weight' of the model is not in the file; did you mean '0.weight'\?"),
        (nn.Sequential(nn.Linear(3, 4, device="meta")), r"'0.weight' is on the meta device"),
        (nn.Sequential(nn.Linear(3, 4), WithExtraState(2, 2)), r"'1._extra_state' is of type dict"),
    ],
)
def test_a_model_that_does_not_fit_is_left_alone(tmp_path: Path, model: nn.Module, message: str) -> None:
    save(nn.Sequential(nn.Linear(3, 4)), tmp_path / "file")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path / "file", model)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "file"))
    for name, parameter in model.named_parameters():
        assert parameter.is_meta or torch.equal(parameter, before[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu(tmp_path: Path) -> None:
    model, other = nn.LSTM(6, 5).cuda(), nn.LSTM(6, 5).cuda()
    masks = Masks({"weight_hh_l0": torch.rand(20, 5, device="cuda") < 0.5})
    masks.apply_(model)
    save(model, tmp_path / "file", masks=masks)
    assert load(tmp_path / "file", other).masks == masks
    assert all(torch.equal(a, b) and b.is_cuda for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_batch_counters_may_be_missing_and_nothing_else(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    model(torch.ones(2, 1, 5, 5))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    safetensors.torch.save_file(state, tmp_path / "plain.safetensors")
    fresh = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    load(tmp_path / "plain.safetensors", fresh)
    assert torch.equal(fresh[1].running_mean, model[1].running_mean)
    assert fresh[1].num_batches_tracked == 0
    del state["1.running_var"]
    safetensors.torch.save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(InputError, match=r"'1\.running_var' of the model is not in the file"):
        load(tmp_path / "less.safetensors", fresh)


# ---------------------------------------------------------------- what was taken out of the model


def small_and_whole() -> tuple[nn.Module, nn.Module, dict[str, dict[str, dict[str, list[int]]]]]:
    """A model without units 0 and 2 of its first layer, a fresh one of the original shape, and what tells them apart."""
    whole = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.Linear(2, 2))
    small = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    units = {"0": [1, 3]}
    own = {f"1.{name}": units for name in ("weight", "bias", "running_mean", "running_var")}
    return small, whole, {"tensors": {"0.weight": units, "0.bias": units, **own, "2.weight": {"1": [1, 3]}}, "layers": {"": [0, 1, 2]}}


def test_a_fresh_model_becomes_as_small_as_the_file(tmp_path: Path) -> None:
    small, whole, removed = small_and_whole()
    save(small, tmp_path / "file", removed=removed)
    loaded = load(tmp_path / "file", whole)
    assert loaded.removed.model_dump() == {**removed, "attributes": {}}
    assert_same(dict(whole.state_dict()), dict(small.state_dict()))
    assert len(whole) == 3
    x = torch.randn(5, 3)
    assert torch.equal(whole.eval()(x), small.eval()(x))
    again, _, _ = small_and_whole()
    load(tmp_path / "file", again)  # as small already
    assert_same(dict(again.state_dict()), dict(small.state_dict()))


def test_a_file_of_a_whole_model_says_nothing_of_removals(tmp_path: Path) -> None:
    small, _, removed = small_and_whole()
    save(small, tmp_path / "file")
    plain = (tmp_path / "file").read_bytes()
    assert b"removed" not in plain
    assert not load(tmp_path / "file").removed
    save(small, tmp_path / "file", removed={})
    assert (tmp_path / "file").read_bytes() == plain
    save(small, tmp_path / "file", removed=removed)
    assert b"removed" in (tmp_path / "file").read_bytes()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2), nn.ReLU()),
            "index 3 is to be kept; the removal is of another model",
        ),
        (
            nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.Linear(2, 2)),
            "'0.weight' is torch.float32 of shape [2, 3]",
        ),
        (nn.Linear(3, 4), "9 of its tensors are not in the model, such as '0.weight'"),
    ],
)
def test_a_model_of_other_shapes_is_refused_and_stays(tmp_path: Path, model: nn.Module, said: str) -> None:
    small, _, removed = small_and_whole()
    save(small, tmp_path / "file", removed=removed)
    before = copy.deepcopy(model)
    with pytest.raises(InputError) as error:
        load(tmp_path / "file", model)
    assert said in str(error.value)
    assert repr(model) == repr(before)
    assert_same(dict(model.state_dict()), dict(before.state_dict()))


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        (
            {"tensors": {"0.weight": {"0": [1, 2, 3]}}},
            "it keeps 3 entries of '0.weight' along dimension 0, and the model's '0.weight' has shape",
        ),
        ({"tensors": {"0.weight": {"5": [1]}}}, "it keeps 1 entries of '0.weight' along dimension 5"),
        ({"tensors": {"0.weight": {"0": [2, 1]}}}, "and increasing"),
        ({"0.weight": {"0": [1]}}, "removed.0.weight: Extra inputs are not permitted"),
    ],
)
def test_a_removal_that_does_not_end_in_the_model_is_not_saved(tmp_path: Path, removed: dict[str, object], said: str) -> None:
    small, _, _ = small_and_whole()
    with pytest.raises(InputError) as error:
        save(small, tmp_path / "file", removed=removed)
    assert said in str(error.value)
    assert not (tmp_path / "file").exists()


def test_tied_weights_of_a_smaller_model_come_back(tmp_path: Path) -> None:
    def tied(width: int) -> nn.Module:
        model = nn.ModuleDict({"a": nn.Embedding(5, width), "b": nn.Linear(width, 5, bias=False)})
        model["b"].weight = model["a"].weight
        return model

    small, whole = tied(2), tied(4)
    save(small, tmp_path / "file", removed={"tensors": {"a.weight": {"1": [0, 3]}}})
    load(tmp_path / "file", whole)
    assert whole["a"].weight is whole["b"].weight
    assert torch.equal(whole["a"].weight, small["a"].weight)
    assert whole["b"].in_features == 2
