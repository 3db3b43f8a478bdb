import copy
import hashlib
import pickle
import struct
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from niwaki.errors import InputError
from niwaki.masks import Masks, Sparsity, bits_of, canonical_name, clear_, pack_bits, sparsity_of, unpack_bits

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def mask_of(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    bits = draw(st.lists(st.booleans(), min_size=prod(shape), max_size=prod(shape)))
    return torch.tensor(bits, dtype=torch.bool).reshape(shape)


@st.composite
def two_masks(draw: st.DrawFn) -> tuple[Masks, Masks]:
    names = draw(st.lists(st.sampled_from(["a.weight", "b.weight", "ü", "c"]), unique=True, max_size=3))
    sizes = {name: draw(shapes) for name in names}
    first, second = ({name: draw(mask_of(shape)) for name, shape in sizes.items()} for _ in range(2))
    return Masks(first), Masks(second)


def as_set(masks: Masks) -> set[tuple[str, int]]:
    """The active positions, found by a plain loop."""
    return {(name, i) for name in masks for i, bit in enumerate(masks[name].flatten().tolist()) if bit}


@pytest.mark.parametrize(
    ("given_name", "expected"),
    [
        ("weight", "weight"),
        ("layer.0.weight", "layer.0.weight"),
        ("_orig_mod.layer.weight", "layer.weight"),
        ("layer._orig_mod.weight", "layer.weight"),
        ("module.layer.weight", "layer.weight"),
        ("module._orig_mod.layer.weight", "layer.weight"),
        ("_orig_mod.module.layer.weight", "layer.weight"),
        ("module.module.layer.weight", "layer.weight"),
        ("layer._checkpoint_wrapped_module.weight", "layer.weight"),
        ("_fsdp_wrapped_module.layer._fsdp_wrapped_module.weight", "layer.weight"),
        ("layer.module.weight", "layer.module.weight"),
        ("my_module.weight", "my_module.weight"),
        ("module", "module"),
        ("_orig_mod", "_orig_mod"),
    ],
)
def test_canonical_name(given_name: str, expected: str) -> None:
    assert canonical_name(given_name) == expected
    assert canonical_name(expected) == expected


def test_canonical_names_are_those_of_the_bare_model_for_every_wrapper() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 2)))
    expected = list(model.state_dict())
    inner = copy.deepcopy(model)
    inner[1] = checkpoint_wrapper(torch.compile(inner[1]))
    for wrapped in (
        torch.compile(model),
        nn.DataParallel(model),
        nn.DataParallel(torch.compile(model)),
        torch.compile(nn.DataParallel(model)),
        inner,
    ):
        assert [canonical_name(name) for name in wrapped.state_dict()] == expected
        assert [canonical_name(name) for name, _ in wrapped.named_parameters()] == expected


@given(shapes.flatmap(mask_of))
def test_packed_bits_are_little_endian_in_row_major_order(mask: torch.Tensor) -> None:
    number = sum(1 << i for i, bit in enumerate(mask.flatten().tolist()) if bit)
    expected = number.to_bytes((mask.numel() + 7) // 8, "little")
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == expected
    assert bytes(pack_bits(mask.t().contiguous().t() if mask.dim() == 2 else mask).tolist()) == expected
    unpacked = unpack_bits(packed, mask.shape)
    assert unpacked.dtype == torch.bool
    assert unpacked.shape == mask.shape
    assert unpacked.tolist() == mask.tolist()


def test_bits_that_do_not_fit_the_shape_are_refused() -> None:
    packed = pack_bits(torch.ones(11, dtype=torch.bool))
    for shape in [(9,), (2, 5), (10,)]:
        with pytest.raises(InputError, match=r"'w': packed bits are set beyond the (9|10) elements"):
            unpack_bits(packed, shape, "'w'")
    for wrong in (packed[:1], torch.cat([packed, packed]), packed.to(torch.int32), packed.reshape(1, 2)):
        with pytest.raises(InputError, match=r"^'w': shape \[11\] needs 2 bytes"):
            unpack_bits(wrong, (11,), "'w'")


@given(two_masks())
def test_set_algebra_and_measures_against_python_sets(pair: tuple[Masks, Masks]) -> None:
    first, second = pair
    a, b = as_set(first), as_set(second)
    everything = {(name, i) for name in first for i in range(first[name].numel())}
    assert as_set(first & second) == a & b
    assert as_set(first | second) == a | b
    assert as_set(first ^ second) == a ^ b
    assert as_set(first - second) == a - b
    assert as_set(~first) == everything - a
    assert (first.active, first.total) == (len(a), len(everything))
    assert first.density == (len(a) / len(everything) if everything else 1.0)
    assert first.sparsity == (len(everything - a) / len(everything) if everything else 0.0)
    assert first.iou(second) == (len(a & b) / len(a | b) if a | b else 1.0)
    assert first.churn(second) == (len(a ^ b) / len(everything) if everything else 0.0)
    assert (first == second) == (a == b)
    assert all(tensor.dtype == torch.bool for tensor in (first ^ second).values())


def test_churn_is_over_all_positions() -> None:
    before, after = torch.zeros(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
    before[:10] = after[10:20] = True
    assert Masks({"w": before}).churn(Masks({"w": after})) == 0.2


def test_ever_active_share_over_time() -> None:
    history = [Masks({"w": torch.tensor([i == step for i in range(8)])}) for step in (1, 3, 3, 1, 6)]
    ever = history[0]
    for masks in history[1:]:
        ever = ever | masks
    assert ever.density == 3 / 8


@given(two_masks())
def test_hash_is_that_of_its_definition(pair: tuple[Masks, Masks]) -> None:
    masks, other = pair
    digest = hashlib.sha256()
    for name in sorted(masks):
        mask, text = masks[name], name.encode()
        digest.update(struct.pack("<q", len(text)) + text + struct.pack(f"<{mask.dim() + 1}q", mask.dim(), *mask.shape))
        digest.update(sum(1 << i for i, bit in enumerate(mask.flatten().tolist()) if bit).to_bytes((mask.numel() + 7) // 8, "little"))
    assert masks.hash() == digest.hexdigest()
    assert Masks({name: masks[name] for name in reversed(list(masks))}).hash() == masks.hash()
    assert (masks.hash() == other.hash()) == (as_set(masks) == as_set(other))


def test_hash_sees_names_and_shapes_and_not_memory_format() -> None:
    mask = torch.rand(2, 3, 4, 5) < 0.5
    reference = Masks({"w": mask}).hash()
    assert Masks({"w": mask.contiguous(memory_format=torch.channels_last)}).hash() == reference
    assert Masks({"module._orig_mod.w": mask}).hash() == reference
    others = [
        Masks({"v": mask}),
        Masks({"w": mask.reshape(2, 3, 20)}),
        Masks({"w": mask.reshape(3, 2, 4, 5)}),
        Masks({"w": ~mask}),
        Masks(),
    ]
    assert len({reference, *(other.hash() for other in others)}) == 6


@given(two_masks())
def test_packing_round_trip_of_all_masks(pair: tuple[Masks, Masks]) -> None:
    masks, _ = pair
    packed = masks.packed()
    assert sum(bits.nbytes for bits in packed.values()) == sum((mask.numel() + 7) // 8 for mask in masks.values())
    assert as_set(Masks.unpack(packed, {name: mask.shape for name, mask in masks.items()})) == as_set(masks)
    for same in (pickle.loads(pickle.dumps(masks)), copy.deepcopy(masks), masks.to("cpu")):
        assert same == masks
        assert same is not masks
        assert hash(same) == hash(masks)


def test_unpack_names_what_is_wrong() -> None:
    packed = Masks({"layer.weight": torch.ones(3, dtype=torch.bool)}).packed()
    with pytest.raises(InputError, match=r"'layer.weight', which is not among the shapes; did you mean 'layers.weight'\?"):
        Masks.unpack(packed, {"layers.weight": (3,)})
    with pytest.raises(InputError, match=r"^masks: 'layer.weight': shape \[9\] needs 2 bytes"):
        Masks.unpack(packed, {"layer.weight": (9,)})


def test_masks_is_an_immutable_mapping() -> None:
    source = {"w": torch.tensor([True, False])}
    masks = Masks(source)
    source["v"] = torch.tensor([True])
    assert list(masks) == ["w"]
    assert "v" not in masks
    assert len(masks) == 1
    with pytest.raises(TypeError):
        masks["w"] = torch.tensor([True, True])  # type: ignore[index]
    with pytest.raises(TypeError):
        del masks["w"]  # type: ignore[attr-defined]
    assert masks != {"w": 1}
    assert repr(masks) == "Masks(1 tensor, 1 of 2 elements active, sparsity 0.5)"
    assert Masks().sparsity == 0.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"w": torch.ones(2)}, r"'w' must be a bool tensor .* got torch.float32"),
        ({"w": [True]}, r"'w' must be a bool tensor .* got list"),
        ({"w": torch.ones(2) > 0, "module.w": torch.ones(2) > 0}, r"'w' is given twice"),
    ],
)
def test_wrong_masks_are_refused(wrong: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Masks(wrong)


def test_algebra_of_different_tensors_is_refused() -> None:
    masks = Masks({"w": torch.ones(2) > 0})
    for other, message in (
        ({"v": torch.ones(2) > 0}, "'w' is in one"),
        ({"w": torch.ones(3) > 0}, r"'w' has shape \[2\] in one and \[3\]"),
    ):
        for operation in (Masks.__and__, Masks.iou, Masks.churn):
            with pytest.raises(InputError, match=message):
                operation(masks, Masks(other))


# -- on a model ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_apply_leaves_positive_zeros_and_nothing_else(dtype: torch.dtype) -> None:
    values = torch.tensor([[-1.0, float("nan"), 2.0], [-3.0, 4.0, -0.0]]).to(dtype)
    model = nn.ParameterDict({"w": nn.Parameter(values.clone(), requires_grad=dtype.is_floating_point)})
    keep = torch.tensor([[False, False, True], [True, False, True]])
    Masks({"w": keep}).apply_(model)
    before, after = (tensor.detach().contiguous().view(torch.uint8).reshape(2, 3, -1) for tensor in (values, model["w"]))
    assert torch.equal(after[keep], before[keep])
    assert not after[~keep].any()
    assert model["w"].requires_grad == dtype.is_floating_point


def test_apply_on_every_memory_format_and_wrapper() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    model[1].weight = nn.Parameter(torch.randn(8, 4, 3, 3).transpose(0, 1))
    reference = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    masks = Masks({name: torch.rand(parameter.shape) < 0.5 for name, parameter in reference.items() if "weight" in name})
    masks.apply_(nn.DataParallel(torch.compile(model)))
    for name, parameter in model.named_parameters():
        expected = torch.where(masks[name], reference[name], torch.zeros(())) if name in masks else reference[name]
        assert torch.equal(parameter, expected)
        assert parameter.stride() == reference[name].stride() or name == "1.weight"


def test_apply_under_either_name_of_a_tied_weight() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    Masks({"1.weight": torch.zeros(3, 3, dtype=torch.bool)}).apply_(model)
    assert not model[0].weight.any()


def test_a_mask_that_does_not_fit_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    before = copy.deepcopy(model.state_dict())
    off = {"0.weight": torch.zeros(3, 3, dtype=torch.bool)}
    with pytest.raises(InputError, match=r"'1.weight' has a mask of shape \[3, 2\], the tensor has shape \[2, 3\]"):
        Masks({**off, "1.weight": torch.zeros(3, 2, dtype=torch.bool)}).apply_(model)
    with pytest.raises(InputError, match=r"'1.weigth' is not a parameter of this Sequential; did you mean '1.weight'\?"):
        Masks({**off, "1.weigth": torch.zeros(3, 2, dtype=torch.bool)}).apply_(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sparsity_by_every_definition() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 5, bias=False))
    model[3].weight = model[2].weight  # tied: 20 + 5 + 5 + 5 + 25 + 5 parameters
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model[0].weight[0] = 0.0  # 4 masked zeros
        model[0].weight[1, :2] = torch.tensor([0.0, -0.0])  # 2 active zeros
        model[1].bias.zero_()  # 5 zeros outside the targets
    keep = torch.ones(5, 4, dtype=torch.bool)
    keep[0] = False
    record = sparsity_of(model, Masks({"0.weight": keep}))
    assert record == Sparsity(targets=20, masked=4, parameters=65, active_zeros=2, zeros=11)
    assert record.of_targets == 4 / 20
    assert record.of_parameters == 4 / 65
    assert record.zeros_among_active == 2 / 16
    assert record.zeros_of_parameters == 11 / 65
    with pytest.raises(AttributeError):
        record.masked = 0  # type: ignore[misc]
    nothing = sparsity_of(nn.Identity(), Masks())
    assert (nothing.of_targets, nothing.of_parameters, nothing.zeros_among_active, nothing.zeros_of_parameters) == (0, 0, 0, 0)


@settings(max_examples=30)
@given(st.data())
def test_sparsity_counts_against_loops(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    values = data.draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, float("nan")]), min_size=prod(shape), max_size=prod(shape)))
    model = nn.ParameterDict({"w": torch.tensor(values).reshape(shape), "v": torch.zeros(3)})
    mask = data.draw(mask_of(shape))
    bits = mask.flatten().tolist()
    record = sparsity_of(model, Masks({"w": mask}))
    assert record.masked == bits.count(False)
    assert record.active_zeros == sum(value == 0 and bit for value, bit in zip(values, bits, strict=True))
    assert record.zeros == 3 + values.count(0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masks_on_a_gpu() -> None:
    model = nn.Linear(7, 5).cuda()
    keep = torch.rand(5, 7) < 0.5
    here, there = Masks({"weight": keep}), Masks({"weight": keep.cuda()})
    assert here.hash() == there.hash()
    assert here == there
    assert here.churn(there) == 0
    here.apply_(model)
    assert torch.equal(model.weight.cpu() != 0, keep)
    assert sparsity_of(model, there).masked == int((~keep).sum())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.int32]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_clear_is_masked_fill(dtype, layout):
    values = (torch.randn(3, 4, 5, 6) * 100).to(dtype)
    if dtype.is_floating_point:
        values.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    values = {
        "contiguous": values,
        "channels_last": values.to(memory_format=torch.channels_last),
        "transposed": values.transpose(0, 3),
    }[layout]
    keep = torch.rand(values.shape) < 0.5
    keep.view(-1)[:4] = torch.tensor([False, True, False, True])
    expected = values.masked_fill(~keep, 0)
    clear_(values, bits_of(keep))
    assert torch.equal(
        torch.view_as_real(values) if dtype.is_complex else values, torch.view_as_real(expected) if dtype.is_complex else expected
    )
    if not dtype.is_complex:
        assert not values[~keep].clone().view(torch.int8).any()  # +0.0, not -0.0
