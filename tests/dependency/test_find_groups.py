"""What a person sees and says: unknown operations, declarations, vetoes, couplings, notes; and that the model stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from niwaki.dependency import find_groups
from niwaki.dependency.rules import pointwise
from niwaki.dependency.values import Call, Dim
from niwaki.errors import InputError

X = torch.ones(2, 3)


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    """Operations that nobody has a rule for."""
    with torch.library._scoped_library("niwaki_test", "DEF") as lib:
        lib.define("scale(Tensor x) -> Tensor")
        lib.define("double(Tensor x) -> Tensor")
        lib.impl("scale", lambda x: x * 2, "CompositeExplicitAutograd")
        lib.impl("double", lambda x: torch.cat([x, x], dim=-1), "CompositeExplicitAutograd")
        yield


class Custom(nn.Module):
    def __init__(self, operation: str, factor: int = 1) -> None:
        super().__init__()
        self.operation = operation
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4 * factor, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(getattr(torch.ops.niwaki_test, self.operation)(self.first(x)))
        return out


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


# ---------------------------------------------------------------- operations without a rule


def test_an_unknown_operation_pins_what_it_touches_and_says_how_to_declare_it() -> None:
    groups = find_groups(Custom("scale"), X)
    assert groups.removable == []
    assert groups["first"].reason == "niwaki_test::scale has no rule"
    [note] = groups.notes
    assert "niwaki_test::scale on (2, 4): has no rule" in note
    assert "rules={'niwaki_test::scale': 'pointwise'}" in note
    assert "couple()" in note


@pytest.mark.parametrize("said", ["pointwise", "same", "relu", "aten::clone", pointwise])
def test_a_declared_operation_is_followed(said: Any) -> None:
    groups = find_groups(Custom("scale"), X, rules={"niwaki_test::scale": said})
    assert [group.name for group in groups.removable] == ["first"]
    assert groups.notes == []


def test_a_rule_of_ones_own() -> None:
    def repeated(call: Call) -> list[tuple[Dim, ...]]:
        from niwaki.dependency.axes import concatenated

        [x] = call.values()
        return [(*x.dims[:-1], Dim(concatenated([x.dims[-1].axis] * 2)))]

    groups = find_groups(Custom("double", 2), X, rules={"niwaki_test::double": repeated})
    [group] = groups.removable
    reads = {(member.name, tuple(member.units.tolist())) for member in group.read_by()}
    assert reads == {("last.weight", (0, 1, 2, 3, 0, 1, 2, 3))}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"niwaki_test::double": "nonsense"}, "'niwaki_test::double' is declared to be like 'nonsense', which has no rule"),
        ({"niwaki_test::double": lambda call: [call.values()[0].dims]}, r"returns \[\(2, 4\)\], and the results are \[\(2, 8\)\]"),
        (
            {"niwaki_test::double": lambda call: 1 / 0},
            r"the rule that was declared for niwaki_test::double on \(2, 4\) failed: ZeroDivisionError",
        ),
    ],
)
def test_wrong_declarations(rules: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_groups(Custom("double", 2), X, rules=rules)


def test_an_operation_with_parts_that_do_not_fit_is_pinned() -> None:
    class Misfit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Linear(3, 4), nn.Linear(3, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            joined = torch.cat([self.a(x), self.b(x)], dim=-1)
            out: Tensor = self.last(joined.unflatten(-1, (2, 3)).flip(-1).flatten(-2))
            return out

    assert find_groups(Misfit(), X).removable == []


# ---------------------------------------------------------------- editing


def test_couple_makes_one_group_of_two() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.c(self.a(x)) + self.d(self.b(x))
            return out

    groups = find_groups(Two(), X)
    assert [group.name for group in groups.removable] == ["a", "b"]
    assert groups.couple(("a.weight", 0), ("b.bias", 0)) is groups
    [group] = groups.removable
    assert {member.name for member in group.members} == {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "d.weight"}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (("0.wieght", 0), ("2.weight", 1), "no tensor '0.wieght'; did you mean '0.weight'"),
        (("0.weight", 2), ("2.weight", 1), "'0.weight' has 2 dimensions, so there is no dimension 2"),
        (("0.weight", -1), ("2.weight", 1), "'0.weight' has 2 dimensions, so there is no dimension -1"),
        (("0.weight", 0), ("2.weight", 0), "0.weight has 4 entries along dimension 0, and 2.weight 5 along 0"),
    ],
)
def test_couplings_that_cannot_be(first: tuple[str, int], second: tuple[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_groups(mlp(), X).couple(first, second)


def test_a_veto_and_taking_it_back() -> None:
    groups = find_groups(mlp(), X)
    assert [group.name for group in groups.removable] == ["0", "2"]
    assert groups.veto("0.weight", "it is the first layer") is groups
    assert [group.name for group in groups.removable] == ["2"]
    assert groups["0"].reason == "it is the first layer"
    assert "no: it is the first layer" in str(groups)
    with pytest.raises(InputError, match=r"there is no veto '2'; vetoes: 0\.weight"):
        groups.allow("2")
    groups.allow("0.weight")
    assert [group.name for group in groups.removable] == ["0", "2"]


def test_names_with_brackets_are_patterns_that_match_themselves() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ChannelShuffle(2), nn.Conv2d(8, 2, 1))
    groups = find_groups(model, torch.ones(1, 3, 2, 2))
    assert [group.name for group in groups.veto("0[0:8]").removable] == ["0"]


def test_a_veto_that_contradicts_a_coupling() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "c": nn.Linear(4, 2), "d": nn.Linear(4, 2)})
    model.forward = lambda x: model["c"](model["a"](x)) + model["d"](model["b"](x))  # type: ignore[method-assign]
    groups = find_groups(model, X).veto("a", "I say so")
    with pytest.raises(
        InputError, match=r"veto 'a' \(I say so\) forbids removal from a\.weight.*with b\.weight, that is free; veto 'b\.weight'"
    ):
        groups.couple(("a.weight", 0), ("b.weight", 0))
    groups.veto("b").couple(("a.weight", 0), ("b.weight", 0))
    assert groups.removable == []


@pytest.mark.parametrize("edit", ["veto", "annotate"])
def test_patterns_that_match_nothing(edit: str) -> None:
    groups = find_groups(mlp(), X)
    with pytest.raises(InputError, match=r"'1\.weight' matches no group and no tensor of one"):
        getattr(groups, edit)("1.weight", "word")


def test_notes_are_printed_and_kept() -> None:
    groups = find_groups(mlp(), X).annotate("2", "wide").veto("0")
    assert groups["2"].note == "wide"
    assert "yes (wide)" in str(groups)


def test_groups_are_a_sequence_with_names() -> None:
    groups = find_groups(mlp(), X)
    assert len(groups) == 3
    assert groups[0] is groups["0"]
    assert [group.name for group in groups[1:]] == ["2", "4"]
    assert repr(groups) == "Groups(3 groups, 2 removable)"
    assert [group.name for group in groups.of("2.weight")] == ["0", "2"]
    assert [group.name for group in groups.of("2.weight", 1)] == ["0"]
    with pytest.raises(InputError, match="no group is called 'O'"):
        groups["O"]


# ---------------------------------------------------------------- the model and its example


class Stateful(nn.Module):
    """Batch normalization, dropout, a counter that every forward raises, and a module in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.frozen = nn.Dropout().eval()
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        if float(self.count) > 100:  # values decide: the run on the meta device cannot know
            raise RuntimeError
        out: Tensor = self.last(self.frozen(F.dropout(self.norm(self.first(x)), training=True)))
        return out


@pytest.mark.parametrize("on_data", [False, True])
def test_the_model_stays_as_it_was(on_data: bool) -> None:
    model: nn.Module = Stateful() if on_data else nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model.train()
    if on_data:
        model.frozen.eval()  # type: ignore[union-attr]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy({**model.state_dict(), **dict(model.named_buffers())})
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    random = torch.get_rng_state()
    groups = find_groups(model, X, layers=True)
    assert [group.name for group in groups.removable] == (["first"] if on_data else ["0"])
    assert any("may depend on the data" in note for note in groups.notes) == on_data
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in {**model.state_dict(), **dict(model.named_buffers())}.items():
        assert torch.equal(tensor, state[name])
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities
    assert all(p.grad is not None and torch.equal(p.grad, torch.ones_like(p)) and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_examples_as_tuple_mapping_or_tensor() -> None:
    names = [
        [group.name for group in find_groups(mlp(), example)]  # type: ignore[arg-type]
        for example in (X, (X,), [X], {"input": X})
    ]
    assert names == [["0", "2", "4"]] * 4


def test_an_example_that_does_not_fit() -> None:
    with pytest.raises(
        InputError, match=r"example: Sequential does not run on it: RuntimeError: mat1 and mat2 shapes cannot be multiplied"
    ):
        find_groups(mlp(), torch.ones(2, 4))
    with pytest.raises(InputError, match="example: arguments of a forward pass are needed"):
        find_groups(mlp())


def test_tied_parameters_are_one_member_under_their_first_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[1].weight
    [group] = find_groups(model, X).removable
    assert {(m.name, m.dim, m.role) for m in group.members if m.name == "1.weight"} == {("1.weight", 0, "output"), ("1.weight", 1, "input")}
    assert "2.weight" not in {member.name for member in group.members}


def test_wrappers_leave_no_trace_in_names() -> None:
    plain = [(group.name, [(m.name, m.dim) for m in group.members]) for group in find_groups(mlp(), X)]
    for wrapped in (nn.DataParallel(mlp()), torch.compile(mlp(), backend="eager")):
        found = [(group.name, [(m.name, m.dim) for m in group.members]) for group in find_groups(wrapped, X)]
        assert found == plain


@pytest.mark.parametrize("named", [False, True])
def test_an_exported_program_brings_its_example(named: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    x = torch.ones(2, 3, 8, 8)
    program = torch.export.export(model, () if named else (x,), {"input": x} if named else {}, strict=False)
    expected = [(g.name, g.kind, g.size, g.reason, len(g.members)) for g in find_groups(model, x)]
    assert [(g.name, g.kind, g.size, g.reason, len(g.members)) for g in find_groups(program)] == expected
    assert [g.name for g in find_groups(program, {"input": x} if named else (x,)).removable] == ["0"]


def test_outputs_in_containers_are_pinned() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            a = self.a(x)
            b = self.b(a)
            return {"hidden": (a, [None]), "out": self.c(b)}

    assert [group.name for group in find_groups(Several(), X).removable] == ["b"]


def test_attention_that_takes_its_scale_from_the_shape() -> None:
    class Attention(nn.Module):
        def __init__(self, scale: float | None) -> None:
            super().__init__()
            self.qkv, self.out, self.scale = nn.Linear(3, 24), nn.Linear(8, 2), scale

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
            out: Tensor = self.out(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))
            return out

    x = torch.ones(2, 5, 3)
    by_shape, by_number = ({g.name: g.reason for g in find_groups(Attention(scale), x) if g.kind == "head_dim"} for scale in (None, 0.5))
    assert list(by_shape.values()) == ["attention is scaled by their number", ""]
    assert list(by_number.values()) == ["", ""]


# ---------------------------------------------------------------- residual blocks


class Blocks(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(count))
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.first(x))
        for block in self.blocks:
            x = x + block(x)
        return x


def test_blocks_that_do_nothing_once_they_are_zero() -> None:
    groups = find_groups(Blocks(), X, layers=True)
    [layers] = [group for group in groups if group.kind == "layer"]
    assert (layers.name, layers.size, layers.reason) == ("blocks:layer", 3, "")
    owned = {(m.name, m.dim, tuple(m.units.tolist())) for m in layers.members}
    expected = {
        (f"blocks.{block}.{layer}.{kind}", 0, (block,) * size)
        for block in range(3)
        for layer, size in ((0, 6), (2, 4))
        for kind in ("weight", "bias")
    }
    assert owned == expected
    assert not any(group.kind == "layer" for group in find_groups(Blocks(), X))


# ---------------------------------------------------------------- what is zero once it is masked


@pytest.mark.parametrize(
    ("features", "exact"),
    [
        (F.relu, True),
        (lambda x: x * 2, True),
        (lambda x: F.normalize(x, dim=-1), True),
        (lambda x: F.elu(x) + 1, False),
        (torch.exp, False),
    ],
)
def test_products_of_activations_need_zeros(features: Any, exact: bool) -> None:
    """Linear attention: what is inside the heads of queries and keys can go only where their features are zero once masked."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            out: Tensor = self.out((features(q) @ (features(k).transpose(-1, -2) @ v)).transpose(1, 2).flatten(2))
            return out

    groups = {group.name: group.reason for group in find_groups(Linear(), torch.ones(2, 5, 3))}
    assert groups["q:head"] == groups["v:head_dim"] == ""
    assert groups["q:head_dim"] == ("" if exact else "it is summed over, and need not be zero there once masked")


@pytest.mark.parametrize(("gate", "exact"), [(torch.tanh, True), (torch.sigmoid, False), (lambda x: x + 1, False), (torch.square, True)])
def test_sums_need_zeros(gate: Any, exact: bool) -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(x * gate(self.first(x)).sum(-1, keepdim=True))
            return out

    assert [group.name for group in find_groups(Summed(), X).removable] == (["first"] if exact else [])
