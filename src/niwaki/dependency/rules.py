"""What each operation does with dimensions: one rule for a family of ATen operations.

A rule takes a :class:`Call` and returns the dimensions of the tensors that the operation returns. It unifies axes that go together and
pins those of which nothing can be removed without changing what the operation computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch

from niwaki.dependency.axes import Axis, Misaligned, concatenated, factor, mark, part_of, pin, product
from niwaki.dependency.values import Call, Dim, Value, fresh, pin_all

Rule = Callable[[Call], list[tuple[Dim, ...]]]

RULES: dict[str, Rule] = {}
"""Operation -> rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations."""

    def register(function: Rule) -> Rule:
        RULES.update({f"aten::{name}": function for name in names})
        return function

    return register


def find(call: Call) -> Rule | None:
    """Return the rule for a call, or None."""
    found = RULES.get(call.name) or RULES.get(call.name.removesuffix("_"))
    if found is None and "pointwise" in call.tags:
        return pointwise
    return found


def named(name: str) -> Rule | None:
    """Return the rule for an ATen operation, or None."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    return RULES.get(f"aten::{name}") or (pointwise if any(torch.Tag.pointwise in overload.tags for overload in overloads) else None)


# ---------------------------------------------------------------- everywhere alike


@rule("hardswish", "floor_divide", "isin", "complex", "polar", "rsub", "log_sigmoid_forward", "rrelu_with_noise")
@rule("where", "masked_fill", "lerp", "copy", "clamp", "maximum", "minimum", "dropout", "native_dropout", "bernoulli", "_prelu_kernel")
def pointwise(call: Call) -> list[tuple[Dim, ...]]:
    """Elements in the same place, after broadcasting, go together."""
    values = call.values()
    found = [aligned(call, values, shape) for shape in call.shapes]
    for dims in found:
        if not all(value.constant for value in values):
            _note_shifts(call, values, dims)
    return found


ZERO_TO_ZERO = {
    *("relu", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "hardtanh", "softshrink", "hardshrink", "tanh"),
    *("sin", "tan", "asin", "atan", "sinh", "asinh", "atanh", "erf", "expm1", "log1p", "sqrt", "square", "neg", "abs", "sign", "round"),
    *("floor", "ceil", "trunc", "frac", "nan_to_num", "dropout", "native_dropout", "_prelu_kernel", "mul", "div"),
}
"""Operations that make zero of zero; products and quotients whatever the other factor is."""

SUMS = {"add", "sub", "maximum", "minimum", "lerp", "where", "copy"}
"""Operations that make zero of zeros."""


def _note_shifts(call: Call, values: Sequence[Value], dims: Sequence[Dim]) -> None:
    """Mark dimensions along which masked units may not be zero any more."""
    name = call.name.removeprefix("aten::").removesuffix("_")
    number = any(isinstance(call.named.get(key), int | float) and call.named[key] != 0 for key in ("other", "exponent"))
    if name in ZERO_TO_ZERO or (name == "pow" and number):
        return
    for back, dim in enumerate(reversed(dims), 1):
        whole = all(len(v.dims) >= back and v.dims[-back].axis.size == dim.axis.size for v in values)
        if dim.axis.size > 1 and not (name in SUMS and whole and not number):
            mark(dim.axis, "shifted")


def aligned(call: Call, values: Sequence[Value], shape: Sequence[int]) -> tuple[Dim, ...]:
    """Unify the dimensions of values that are broadcast to a shape."""
    dims: list[Dim] = []
    constant = all(value.constant for value in values)
    for back in range(1, len(shape) + 1):
        size = shape[-back]
        here = [v.dims[-back] for v in values if len(v.dims) >= back and v.dims[-back].axis.size == size]
        if size == 1 or not here:
            dims.insert(0, Dim(product([]), frozenset().union(*(d.sources for d in here))) if size == 1 else fresh(size))
            continue
        for other in here[1:]:
            call.couple(here[0].axis, other.axis)
        dims.insert(0, Dim(here[0].axis, frozenset().union(*(d.sources for d in here)) if constant else frozenset()))
    return tuple(dims)


@rule(
    *("clone", "alias", "detach", "_to_copy", "contiguous", "lift_fresh", "lift_fresh_copy", "lift", "to", "view_of", "_conj", "set_data"),
    *("tril", "triu", "resolve_conj", "requires_grad", "fill", "zero", "fill_diagonal", "native_layer_norm_backward", "random"),
    *("uniform", "normal", "exponential", "log_normal", "bernoulli", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like"),
    *("randn_like", "_assert_async", "_pin_memory", "view_as_real_copy", "expand_as_same", "randint_like", "nan_to_num", "logical_not"),
)
def same(call: Call) -> list[tuple[Dim, ...]]:
    """The result has the dimensions of the first argument."""
    first = call.values()[0]
    return [first.dims if first.shape == shape else tuple(map(fresh, shape)) for shape in call.shapes]


@rule(
    *("zeros", "ones", "full", "empty", "scalar_tensor", "rand", "randn", "randint", "new_zeros", "new_ones", "new_full", "new_empty"),
    *("empty_strided", "new_empty_strided", "empty_permuted", "_efficientzerotensor"),
)
def made(call: Call) -> list[tuple[Dim, ...]]:
    """The result is made from numbers alone, the same everywhere."""
    return [tuple(map(fresh, shape)) for shape in call.shapes]


@rule("arange", "range", "linspace", "logspace", "eye", "randperm", "tril_indices", "triu_indices", "fft_fftfreq", "fft_rfftfreq")
@rule("hann_window", "hamming_window", "bartlett_window", "blackman_window", "kaiser_window")
def numbered(call: Call) -> list[tuple[Dim, ...]]:
    """The result is made from numbers alone, and tells entries apart by their place."""
    reason = f"{call.name.removeprefix('aten::')} tells its entries apart by their place"
    return [tuple(fresh(n, reason) for n in shape) for shape in call.shapes]


# ---------------------------------------------------------------- products


@rule("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "addmv", "addbmm", "_grouped_mm", "linear", "matmul", "_scaled_mm", "_int_mm")
def matrix_product(call: Call) -> list[tuple[Dim, ...]]:
    """``[..., n, k] @ [..., k, m]``: k is summed over; leading dimensions go together."""
    values = call.values()
    if call.name == "aten::linear":
        a, weight, *bias = values
        b = Value(weight.dims[::-1], weight.constant)
    else:
        *bias, a, b = values[: 2 + (call.name in ADDED)]
    return [product_of(call, a, b, bias, call.shapes[0])]


ADDED = ("aten::addmm", "aten::baddbmm", "aten::addmv", "aten::addbmm")


def product_of(call: Call, a: Value, b: Value, bias: Sequence[Value], shape: Sequence[int]) -> tuple[Dim, ...]:
    """Apply the rule of a matrix product of two values, with something added."""
    at = -1 if len(b.dims) == 1 else -2
    call.contract(a, -1, b, at)
    batch = max(len(a.dims), len(b.dims)) - 2
    if len(a.dims) == len(b.dims) and batch > 0:
        for i in range(batch):
            if a.dims[i].axis.size == b.dims[i].axis.size:
                call.couple(a.dims[i].axis, b.dims[i].axis)
            if not a.constant and not b.constant:
                mark(a.dims[i].axis, "batched")
    constant = a.constant and b.constant
    if not a.constant and not b.constant and b.dims[-1].axis.size > 1 and at == -2:  # attention: what is inside the heads of values
        mark(b.dims[-1].axis, "inside")
        mark(a.dims[-2].axis, "inside")
    if constant:
        made = b.dims[-1:] if call.reads(b, at) else a.dims[-2:-1]
        for dim in made:
            call.role(dim, "output")
            call.facts.placed |= dim.sources
    elif a.constant:
        for dim in a.dims[-2:-1]:
            call.role(dim, "output")
    elif b.constant and at == -2:
        call.role(b.dims[-1], "output")
    if call.name == "aten::_grouped_mm":  # [T, k] by [E, k, m]: rows belong to experts by their place
        dims = (*a.dims[:-1], b.dims[-1])
        pin_all(b.dims[:-2], "experts are told apart by their place") if b.constant else None
        return dims
    lead = a.dims[:-2] if len(a.dims) >= len(b.dims) else b.dims[:-2]
    dims = (*lead, *a.dims[-2:-1], *(b.dims[-1:] if at == -2 else ()))
    dims = tuple(Dim(dim.axis, dim.sources if constant else frozenset()) for dim in dims)
    if len(dims) != len(shape):
        raise Misaligned(f"{call.name} of {a.shape} and {b.shape}")
    aligned(call, [Value(dims), *bias], shape)
    return dims


@rule("convolution", "_convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(call: Call) -> list[tuple[Dim, ...]]:
    """Channels are the second dimension; ``g`` groups are the outer factor of channels in and out."""
    x, weight, bias = call.named["input"], call.named["weight"], call.named.get("bias")
    groups = call.named["groups"]
    transposed = call.named.get("transposed", "transpose" in call.name)
    channels = x.dims[1]
    out_shape = call.shapes[0]
    pin_all(weight.dims[2:], "it counts positions of a kernel")
    pin_all(x.dims[2:], "it counts positions")
    if not transposed:
        if groups == 1:
            call.contract(x, 1, weight, 1)
            call.role(weight.dims[0], "output")
        else:
            inside = x.shape[1] // groups
            outer, inner = factor(channels.axis, inside)
            group, _ = factor(weight.dims[0].axis, out_shape[1] // groups)
            call.couple(outer, group)
            mark(group, "groups")
            if inside > 1:
                call.couple(inner, weight.dims[1].axis)
                call.role(weight.dims[1], "input")
            if out_shape[1] > groups:
                call.role(weight.dims[0], "output")
        out = weight.dims[0]
    else:
        call.couple(channels.axis, weight.dims[0].axis)
        out = weight.dims[1]
        if groups > 1:
            group, _ = factor(channels.axis, x.shape[1] // groups)
            mark(group, "groups")
            out = Dim(product([group, weight.dims[1].axis]))
        if x.shape[1] > groups:
            call.role(weight.dims[0], "input")
        call.role(weight.dims[1], "output")
    if bias is not None:
        call.couple(bias.dims[0].axis, out.axis)
    places = tuple(fresh(size, "it counts positions") for size in out_shape[2:])
    return [(x.dims[0], Dim(out.axis), *places)]


@rule("embedding")
def embedding(call: Call) -> list[tuple[Dim, ...]]:
    """Rows are looked up."""
    weight, indices = call.values()
    pin(weight.dims[0].axis, "its entries are looked up by index")
    call.role(weight.dims[1], "output")
    return [(*indices.dims, Dim(weight.dims[1].axis))]


@rule("outer", "ger")
def outer(call: Call) -> list[tuple[Dim, ...]]:
    """Every entry with every entry."""
    a, b = call.values()
    return [(a.dims[0], b.dims[0])]


# ---------------------------------------------------------------- normalizations


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm")
@rule("_batch_norm_with_update", "_batch_norm_no_update", "_native_batch_norm_legit_functional")
def batch_norm(call: Call) -> list[tuple[Dim, ...]]:
    """Every channel by itself."""
    x, *others = call.values()
    if not others or call.named["weight"] is None:
        mark(x.dims[1].axis, "shifted")
    if call.named.get("training", True):  # such as standardized weights
        pin_all([x.dims[0], *x.dims[2:]], "a normalization takes the mean and variance over it, which fewer would change")
    for other in others:
        if other.shape == (x.shape[1],):
            call.couple(x.dims[1].axis, other.dims[0].axis)
    return [x.dims, *((Dim(x.dims[1].axis),) if shape == (x.shape[1],) else tuple(map(fresh, shape)) for shape in call.shapes[1:])]


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm", "fused_layer_norm")
def layer_norm(call: Call) -> list[tuple[Dim, ...]]:
    """The last dimensions are normalized together."""
    x, *others = call.values()
    count = len(call.named["normalized_shape"])
    what = "root mean square" if "rms" in call.name else "mean and variance"
    pin_all(x.dims[-count:], f"a normalization takes the {what} over it, which fewer would change")
    for other in others:
        aligned(call, [x, other], x.shape)
    rest = [tuple(d if d.axis.size == size else fresh(size) for d, size in zip(x.dims, shape, strict=False)) for shape in call.shapes[1:]]
    return [x.dims, *rest]


@rule("native_group_norm", "group_norm")
def group_norm(call: Call) -> list[tuple[Dim, ...]]:
    """Channels of a group are normalized together; whole groups can go."""
    x, *others = call.values()
    groups = call.named["group"] if "group" in call.named else call.named["num_groups"]
    outer, inner = factor(x.dims[1].axis, x.shape[1] // groups)
    pin(inner, "a group normalization takes the mean over it, which fewer would change")
    mark(outer, "groups")
    for other in others:
        call.couple(x.dims[1].axis, other.dims[0].axis)
    return [x.dims, *(tuple(map(fresh, shape)) for shape in call.shapes[1:])]


@rule("_weight_norm_interface")
def weight_norm(call: Call) -> list[tuple[Dim, ...]]:
    """``v g / |v|``, the norm over all dimensions but one: zeros add nothing to it, but where all is zero it is no divisor."""
    v, g = call.values()
    pin(v.dims[call.named["dim"]].axis, "a weight normalization divides by the norm, which masking makes zero")
    aligned(call, [v, g], v.shape)
    return [v.dims, *(g.dims if shape == g.shape else tuple(map(fresh, shape)) for shape in call.shapes[1:])]


# ---------------------------------------------------------------- along a dimension


def _list(value: object) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [int(value)]  # type: ignore[call-overload]


def _dims_of(call: Call, x: Value) -> set[int]:
    """Return the dimensions that a reduction runs over."""
    given = call.named.get("dim", call.named.get("dims"))
    chosen = _list(given)
    return {d % max(len(x.dims), 1) for d in chosen} if chosen or len(x.dims) == 0 else set(range(len(x.dims)))


@rule("sum", "linalg_vector_norm", "norm", "any", "nansum", "count_nonzero")
def total(call: Call) -> list[tuple[Dim, ...]]:
    """Zeros add nothing to a sum, so that what is summed over can go."""
    x = call.values()[0]
    if not x.constant:
        for d in _dims_of(call, x):
            mark(x.dims[d].axis, "summed")
    return _reduced(call, "")


@rule(
    *("mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min", "prod", "logsumexp", "argmax", "argmin", "all", "median")
)
@rule("aminmax", "mode", "kthvalue")
def reduction(call: Call) -> list[tuple[Dim, ...]]:
    """What is reduced cannot lose an entry: a mean, a maximum of zeros."""
    if len(call.values()) > 1:
        return pointwise(call)
    return _reduced(call, f"{call.name.removeprefix('aten::')} runs over it, which fewer would change")


def _reduced(call: Call, reason: str) -> list[tuple[Dim, ...]]:
    x = call.values()[0]
    dims = _dims_of(call, x)
    if reason:
        pin_all([x.dims[d] for d in dims], reason)
    found = []
    for shape in call.shapes:
        if len(shape) == len(x.dims):
            found.append(tuple(fresh(1) if i in dims else dim for i, dim in enumerate(x.dims)))
        else:
            found.append(tuple(dim for i, dim in enumerate(x.dims) if i not in dims))
    return found


@rule(
    "_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "sort", "argsort", "flip", "roll", "logcumsumexp", "cummax"
)
@rule("_safe_softmax", "renorm", "cummin", "rot90", "fft_fft", "fft_ifft", "_fft_c2c", "unique_consecutive")
def along(call: Call) -> list[tuple[Dim, ...]]:
    """All entries of a dimension have to do with each other."""
    x = call.values()[0]
    what = call.name.removeprefix("aten::").strip("_")
    pin_all([x.dims[d] for d in _dims_of(call, x)], f"{what} runs over it, which fewer would change")
    if "softmax" in what and not x.constant:
        for dim in x.dims:
            mark(dim.axis, "shifted")
    return [tuple(d if d.axis.size == n else fresh(n) for d, n in zip(x.dims, shape, strict=False)) for shape in call.shapes]


@rule("topk", "_fft_r2c", "_fft_c2r", "nonzero", "unique", "_unique2", "unique_dim", "multinomial", "bincount", "histc", "masked_select")
@rule("searchsorted", "bucketize", "nonzero_static", "one_hot", "unfold", "im2col", "col2im", "grid_sampler_2d", "affine_grid_generator")
def chosen(call: Call) -> list[tuple[Dim, ...]]:
    """The dimensions whose size changes are pinned, with what comes of them."""
    reason = f"{call.name.removeprefix('aten::').strip('_')} chooses among it"
    x = call.values()[0]
    found = []
    for shape in call.shapes:
        keeps = [len(shape) == len(x.dims) and x.dims[i].axis.size == n for i, n in enumerate(shape)]
        found.append(tuple(x.dims[i] if keep else fresh(n, reason) for i, (keep, n) in enumerate(zip(keeps, shape, strict=True))))
        pin_all([d for i, d in enumerate(x.dims) if not (i < len(shape) and keeps[i])], reason)
    if "dim" in call.named and x.dims:
        pin_all([x.dims[d] for d in _dims_of(call, x)], reason)
    return found


# ---------------------------------------------------------------- places


@rule("avg_pool1d", "adaptive_avg_pool1d", "max_pool1d", "upsample_nearest1d", "upsample_linear1d", "_upsample_nearest_exact1d")
@rule("reflection_pad1d", "replication_pad1d")
def places1(call: Call) -> list[tuple[Dim, ...]]:
    """The last dimension is one of positions."""
    return _places(call, 1)


@rule("avg_pool2d", "max_pool2d", "max_pool2d_with_indices", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d")
@rule("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa")
@rule("reflection_pad2d", "replication_pad2d", "_upsample_bicubic2d_aa", "fractional_max_pool2d")
def places2(call: Call) -> list[tuple[Dim, ...]]:
    """The last two dimensions are positions."""
    return _places(call, 2)


@rule("avg_pool3d", "max_pool3d", "max_pool3d_with_indices", "adaptive_avg_pool3d", "_adaptive_avg_pool3d", "adaptive_max_pool3d")
@rule("upsample_nearest3d", "upsample_trilinear3d", "reflection_pad3d", "replication_pad3d")
def places3(call: Call) -> list[tuple[Dim, ...]]:
    """The last three dimensions are positions."""
    return _places(call, 3)


def _places(call: Call, count: int) -> list[tuple[Dim, ...]]:
    x = call.values()[0]
    pin_all(x.dims[-count:], "it counts positions")
    return [(*x.dims[:-count], *(fresh(n, "it counts positions") for n in shape[-count:])) for shape in call.shapes]


# ---------------------------------------------------------------- shapes


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "squeeze", "unsqueeze", "squeeze_copy", "view_copy")
def view(call: Call) -> list[tuple[Dim, ...]]:
    """Dimensions are merged (products) and split (their factors)."""
    x = call.values()[0]
    return [reshaped(call, x, shape) for shape in call.shapes]


def reshaped(call: Call, x: Value, shape: Sequence[int]) -> tuple[Dim, ...]:
    """Return the dimensions of a value in another shape."""
    if 0 in shape:
        return tuple(map(fresh, shape))
    found: list[Dim] = []
    left = [dim for dim in x.dims if dim.axis.size != 1]
    sizes = [size for size in shape if size != 1]
    while sizes:
        ins, outs = [left.pop(0)], [sizes.pop(0)]
        while prod(d.axis.size for d in ins) != prod(outs):
            if prod(d.axis.size for d in ins) < prod(outs):
                ins.append(left.pop(0))
            else:
                outs.append(sizes.pop(0))
        sources = frozenset().union(*(d.sources for d in ins))
        if len(ins) == len(outs) == 1:
            found += ins
            continue
        try:
            rest = product([d.axis for d in ins])
            inner: list[Axis] = []
            for size in reversed(outs[1:]):
                rest, one = factor(rest, size)
                inner.insert(0, one)
            found += [Dim(axis, sources) for axis in (rest, *inner)]
        except Misaligned:
            reason = f"a view as {tuple(shape)} cuts it into parts that do not fit it"
            pin_all(ins, reason)
            found += [fresh(size, reason) for size in outs]
    return tuple(fresh(1) if size == 1 else found.pop(0) for size in shape)


@rule("permute", "transpose", "t", "numpy_T", "movedim", "swapaxes", "adjoint", "mT", "T")
def permute(call: Call) -> list[tuple[Dim, ...]]:
    """Dimensions in another order."""
    x = call.values()[0]
    if "dims" in call.named:
        return [tuple(x.dims[d] for d in call.named["dims"])]
    dims = list(x.dims)
    if len(dims) > 1:
        a, b = (call.named["dim0"], call.named["dim1"]) if "dim0" in call.named else (0, 1)
        dims[a], dims[b] = dims[b], dims[a]
    return [tuple(dims)]


@rule("expand", "expand_as", "broadcast_to")
def expand(call: Call) -> list[tuple[Dim, ...]]:
    """Dimensions of size 1 are repeated, new ones come in front."""
    x, shape = call.values()[0], call.shapes[0]
    offset = len(shape) - len(x.dims)
    return [tuple(x.dims[i - offset] if i >= offset and x.dims[i - offset].axis.size == n else fresh(n) for i, n in enumerate(shape))]


@rule("repeat", "tile")
def repeat(call: Call) -> list[tuple[Dim, ...]]:
    """Every dimension is its copies, one after the other."""
    x, shape = call.values()[0], call.shapes[0]
    offset = len(shape) - len(x.dims)
    dims = []
    for i, n in enumerate(shape):
        old = x.dims[i - offset] if i >= offset else fresh(1)
        dims.append(old if old.axis.size == n else Dim(product([Axis(n // old.axis.size), old.axis]), old.sources))
    return [tuple(dims)]


@rule("cat", "concatenate", "concat")
def cat(call: Call) -> list[tuple[Dim, ...]]:
    """One after the other along a dimension; the others go together."""
    values = [v for v in call.values() if v.shape != (0,)]
    at = call.named["dim"] % len(call.shapes[0])
    shapes = [(*v.shape[:at], 1, *v.shape[at + 1 :]) for v in values]
    dims = list(aligned(call, [Value((*v.dims[:at], fresh(1), *v.dims[at + 1 :]), v.constant) for v in values], shapes[0]))
    terms = [v.dims[at] for v in values]
    alone = "it is one entry of a concatenation"
    sources = frozenset().union(*(d.sources for d in terms)) if all(v.constant for v in values) else frozenset()
    dims[at] = Dim(concatenated([Axis(1, alone) if d.axis.size == 1 else d.axis for d in terms]), sources)
    return [tuple(dims)]


@rule("stack")
def stack(call: Call) -> list[tuple[Dim, ...]]:
    """A new dimension; the others go together."""
    values = call.values()
    at = call.named["dim"] % len(call.shapes[0])
    dims = list(aligned(call, values, values[0].shape))
    dims.insert(at, fresh(len(values), "it counts what is stacked"))
    return [tuple(dims)]


@rule("slice", "narrow")
def slice_(call: Call) -> list[tuple[Dim, ...]]:
    """Part of a dimension."""
    x, shape = call.values()[0], call.shapes[0]
    at = call.named["dim"] % len(x.dims)
    old, size = x.dims[at], x.shape[at]
    start = call.named["start"] or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    step = call.named.get("step", 1)
    return [(*x.dims[:at], _piece(call, old, start, shape[at], step), *x.dims[at + 1 :])]


def _piece(call: Call, old: Dim, start: int, length: int, step: int = 1) -> Dim:
    """Return a part of a dimension."""
    size = old.axis.size
    if length == size:
        return old
    if length == 0:
        return fresh(0)
    try:
        if step > 1:
            if size % step or length != size // step:
                raise Misaligned
            outer, inner = factor(old.axis, step)
            pin(inner, "single ones of it are picked")
            return Dim(outer, old.sources)
        axis = part_of(old.axis, start, start + length)
    except Misaligned:
        reason = f"{call.name.removeprefix('aten::')} cuts through units of it"
        pin(old.axis, reason)
        return fresh(length, reason)
    if length == 1:
        pin(axis, "it is picked by its index")
        return Dim(product([]), old.sources)
    return Dim(axis, old.sources)


@rule("select")
def select(call: Call) -> list[tuple[Dim, ...]]:
    """One entry of a dimension."""
    x = call.values()[0]
    at, index = call.named["dim"] % len(x.dims), call.named["index"]
    _piece(call, x.dims[at], index % x.shape[at], 1)
    return [(*x.dims[:at], *x.dims[at + 1 :])]


@rule("unbind")
def unbind(call: Call) -> list[tuple[Dim, ...]]:
    """Every entry of a dimension by itself."""
    x = call.values()[0]
    at = call.named["dim"] % len(x.dims)
    pin(x.dims[at].axis, "its entries are taken apart")
    return [(*x.dims[:at], *x.dims[at + 1 :]) for _ in call.shapes]


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "tensor_split")
def splits(call: Call) -> list[tuple[Dim, ...]]:
    """A dimension in several parts."""
    x = call.values()[0]
    at = call.named["dim"] % len(x.dims)
    found, start = [], 0
    for shape in call.shapes:
        found.append((*x.dims[:at], _piece(call, x.dims[at], start, shape[at]), *x.dims[at + 1 :]))
        start += shape[at]
    return found


@rule("constant_pad_nd", "pad")
def padding(call: Call) -> list[tuple[Dim, ...]]:
    """Constant entries before and after those of a dimension."""
    x, pads = call.values()[0], call.named["pad"]
    dims = list(x.dims)
    for i in range(len(pads) // 2):
        before, after = pads[2 * i], pads[2 * i + 1]
        at = len(dims) - 1 - i
        if min(before, after) < 0:
            old = dims[at]
            dims[at] = _piece(call, old, max(-before, 0), old.axis.size + min(before, 0) + min(after, 0))
        reason = "it is added as padding"
        terms = [Axis(max(before, 0), reason), dims[at].axis if dims[at].axis.size > 1 else Axis(dims[at].axis.size, reason)]
        if max(before, after) > 0:
            dims[at] = Dim(concatenated([*terms, Axis(max(after, 0), reason)]), dims[at].sources)
    return [tuple(dims)]


@rule("as_strided")
def as_strided(call: Call) -> list[tuple[Dim, ...]]:
    """The same shape in another memory format; what else can be done with strides has no rule."""
    x = call.values()[0]
    return [x.dims] if x.shape == call.shapes[0] else unknown(call, "strides that make another shape have no rule")


@rule("view_as_real")
def view_as_real(call: Call) -> list[tuple[Dim, ...]]:
    """``[..., n] -> [..., n, 2]``."""
    return [(*call.values()[0].dims, fresh(2, "it counts the real and the imaginary part"))]


@rule("view_as_complex")
def view_as_complex(call: Call) -> list[tuple[Dim, ...]]:
    """``[..., n, 2] -> [..., n]``."""
    x = call.values()[0]
    pin(x.dims[-1].axis, "it counts the real and the imaginary part")
    return [x.dims[:-1]]


@rule("glu")
def glu(call: Call) -> list[tuple[Dim, ...]]:
    """The first half of a dimension times the sigmoid of the second."""
    x, shape = call.values()[0], call.shapes[0]
    at = call.named["dim"] % len(x.dims)
    first, second = (_piece(call, x.dims[at], start, shape[at]) for start in (0, shape[at]))
    call.couple(first.axis, second.axis)
    return [(*x.dims[:at], first, *x.dims[at + 1 :])]


@rule("diagonal")
def diagonal(call: Call) -> list[tuple[Dim, ...]]:
    """Two dimensions become one of pairs."""
    x = call.values()[0]
    chosen = {call.named[name] % len(x.dims) for name in ("dim1", "dim2")}
    pin_all([x.dims[d] for d in chosen], "a diagonal of it is taken")
    rest = [dim for i, dim in enumerate(x.dims) if i not in chosen]
    return [(*rest, fresh(call.shapes[0][-1], "a diagonal of it is taken"))]


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> list[tuple[Dim, ...]]:
    """``[C r r, H, W] -> [C, H r, W r]``."""
    x, shape = call.values()[0], call.shapes[0]
    outer, inner = factor(x.dims[-3].axis, x.shape[-3] // shape[-3])
    pin(inner, "it becomes positions")
    return [(*x.dims[:-3], Dim(outer), fresh(shape[-2], "it counts positions"), fresh(shape[-1], "it counts positions"))]


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> list[tuple[Dim, ...]]:
    """``[C, H r, W r] -> [C r r, H, W]``."""
    x, shape = call.values()[0], call.shapes[0]
    axis = product([x.dims[-3].axis, Axis(shape[-3] // x.shape[-3], "it was made of positions")])
    return [(*x.dims[:-3], Dim(axis), fresh(shape[-2], "it counts positions"), fresh(shape[-1], "it counts positions"))]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> list[tuple[Dim, ...]]:
    """``[g, C / g]`` transposed."""
    x = call.values()[0]
    outer, inner = factor(x.dims[1].axis, x.shape[1] // call.named["groups"])
    return [(x.dims[0], Dim(product([inner, outer])), *x.dims[2:])]


# ---------------------------------------------------------------- look-ups


@rule("index", "_unsafe_index")
def index(call: Call) -> list[tuple[Dim, ...]]:
    """Entries of some dimensions are looked up, the others pass."""
    x = call.values()[0]
    indices = list(call.named["indices"])
    shape = call.shapes[0]
    used = [i for i, one in enumerate(indices) if isinstance(one, Value)]
    pin_all([x.dims[i] for i in used], "its entries are looked up by index")
    together = used == list(range(used[0], used[-1] + 1))
    passing = [dim for i, dim in enumerate(x.dims) if i not in used]
    new = len(shape) - len(passing)
    at = used[0] if together else 0
    found = [*passing[:at], *(fresh(n) for n in shape[at : at + new]), *passing[at:]]
    if [dim.axis.size for dim in found] != list(shape):  # a mask of several dimensions
        pin_all(x.dims, "its entries are looked up by index")
        found = [fresh(n) for n in shape]
    for one in indices:
        if isinstance(one, Value) and len(one.dims) == new and new:
            aligned(call, [Value(tuple(found[at : at + new])), one], shape[at : at + new])
    return [tuple(found)]


@rule("index_select")
def index_select(call: Call) -> list[tuple[Dim, ...]]:
    """Entries of one dimension are looked up."""
    x, indices = call.values()
    at = call.named["dim"] % len(x.dims)
    pin(x.dims[at].axis, "its entries are looked up by index")
    return [(*x.dims[:at], *(indices.dims or (fresh(1),)), *x.dims[at + 1 :])]


@rule("gather")
def gather(call: Call) -> list[tuple[Dim, ...]]:
    """Entries of one dimension are looked up, in every place others."""
    x, where = call.values()
    at = call.named["dim"] % max(len(x.dims), 1)
    pin(x.dims[at].axis, "its entries are looked up by index")
    for i, (a, b) in enumerate(zip(x.dims, where.dims, strict=True)):
        if i != at and a.axis.size == b.axis.size:
            call.couple(a.axis, b.axis)
    return [where.dims]


@rule(
    "index_put", "_unsafe_index_put", "_index_put_impl", "masked_scatter", "index_add", "index_copy", "scatter", "scatter_add", "index_fill"
)
@rule("scatter_reduce", "slice_scatter", "select_scatter", "put", "masked_scatter_")
def scatter(call: Call) -> list[tuple[Dim, ...]]:
    """Entries are written into some places of the first argument: the trailing dimensions go together, those written to are pinned."""
    x, *others = call.values()
    indices = call.named.get("indices")
    if indices is not None:
        written = {i for i, one in enumerate(indices) if isinstance(one, Value)}
    elif "dim" in call.named:
        written = {call.named["dim"] % max(len(x.dims), 1)}
    else:
        written = set()
    pin_all([x.dims[i] for i in written], "single ones of it are written to")
    for other in others:
        for back in range(1, min(len(x.dims), len(other.dims)) + 1):
            a, b = x.dims[-back].axis, other.dims[-back].axis
            if len(x.dims) - back not in written and a.size == b.size:
                call.couple(a, b)
    return [x.dims for _ in call.shapes]


def unknown(call: Call, why: str = "has no rule") -> list[tuple[Dim, ...]]:
    """Pin everything that an operation touches which has no rule, or one that does not cover the case."""
    shapes = " and ".join(str(value.shape) for value in call.values())
    call.facts.unknown.setdefault(call.name, f"on {shapes}: {why}")
    return _opaque(call, f"{call.name} has no rule")


def misaligned(call: Call) -> list[tuple[Dim, ...]]:
    """Pin everything that an operation touches which puts parts together that do not fit."""
    return _opaque(call, f"{call.name} aligns parts of it that do not fit each other")


def _opaque(call: Call, reason: str) -> list[tuple[Dim, ...]]:
    for value in call.values():
        pin_all(value.dims, reason)
    return [tuple(fresh(n, reason) for n in shape) for shape in call.shapes]
