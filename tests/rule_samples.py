"""Calls of operators to try their rules on.

A plain row and a pointwise operator need no entry here: their samples follow from the row's letters
and from the schema. Every other operator of the table has its samples in ``SAMPLES``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from autoshard.rules import RULES, Rule
from autoshard.rules.notation import parse

T = TypeVar("T")

SIZES = (4, 6, 8, 12, 2)

# Rows with an operand of integers, which a row cannot say.
ROWS_ON_INDICES = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")


@dataclass(frozen=True)
class Fixed:
    """A tensor that takes no gradient: a buffer."""

    value: Tensor


@dataclass(frozen=True)
class Sample:
    """One call. Tensors of floats in it are parameters, all others are inputs.

    Attributes:
        args, kwargs: of the operator.
        splits: at least so many axes can be split; 0: none can, and that is right.
        values: whether the results can be compared; where not, their shapes are.
        backward: whether the operator has a derivative to call.
        complex: the first operand is viewed as complex numbers first.
        refined: whether parts of any size are allowed: a fused kernel may want multiples of 16 bytes.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    splits: int = 1
    values: bool = True
    backward: bool = True
    complex: bool = False
    refined: bool = True


class Draw:
    """Where samples take their sizes, choices and numbers from.

    Args:
        choose: picks one of a sequence; it prefers the first.
        seed: of the numbers.
    """

    def __init__(self, choose: Callable[[Sequence[Any]], Any], seed: int = 0) -> None:
        self._choose = choose
        self._generator = torch.Generator().manual_seed(seed)
        self._sizes = 0

    def choice(self, *options: T) -> T:
        """One of the options."""
        chosen: T = self._choose(options)
        return chosen

    def size(self) -> int:
        """An even size, a new one each time where nothing is random."""
        turn = self._sizes % len(SIZES)
        self._sizes += 1
        size: int = self._choose(SIZES[turn:] + SIZES[:turn])
        return size

    def real(self, *shape: int) -> Tensor:
        """Distinct numbers between 0.1 and 0.9, where most functions are smooth."""
        return 0.1 + 0.8 * torch.rand(shape, generator=self._generator, dtype=torch.float64)

    def below(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high)."""
        return torch.randint(high, shape, generator=self._generator)

    def mask(self, *shape: int) -> Tensor:
        """True and False."""
        return self.below(2, *shape).bool()


Build = Callable[[Draw], Sample]


def operator_named(name: str) -> torch._ops.OpOverload:
    """The operator of ``"aten.linear.default"``."""
    namespace, packet, overload = name.split(".")
    found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    return found


def builders(name: str) -> tuple[Build, ...]:
    """All samples of an operator of the table, those that follow from its rule first."""
    derived: tuple[Build, ...] = ()
    rule = RULES[name]
    if is_row(rule) and name not in ROWS_ON_INDICES:
        derived = (lambda draw: sample_of_row(rule, draw),)
    elif rule.text == "pointwise":
        derived = pointwise_builders(operator_named(name))
    return (*derived, *SAMPLES.get(name, ()))


def is_row(rule: Rule) -> bool:
    """Whether the rule is written in the notation."""
    return "->" in rule.text


def sample_of_row(rule: Rule, draw: Draw) -> Sample:
    """Tensors with the letters' sizes; all leading dimensions alike, or missing in some."""
    row = parse(rule.text)
    sizes: dict[str, int] = {}
    leading = [draw.size() for _ in range(draw.choice(1, 0, 2))]
    summed = {letter for o in row.operands for letter, mark in o.letters if mark == "+"}
    whole = {letter for o in row.operands for letter, mark in o.letters if mark == "^"}
    tensors = []
    for operand in row.operands:
        for letter, _ in operand.letters:
            if letter not in sizes:
                sizes[letter] = draw.size()
        shape = [sizes[letter] for letter, _ in operand.letters]
        if operand.leading:
            shape = [*leading, *shape]
        tensors.append(draw.real(*shape))
    kept = {letter for letter, _ in row.result.letters}
    return Sample(tuple(tensors), splits=len((kept | summed) - whole))


POINTWISE_SHAPES: tuple[Callable[[int, int], list[list[int]]], ...] = (
    lambda a, b: [[a, b], [a, b], [a, b]],
    lambda a, b: [[a, b], [b], [a, 1]],
    lambda a, b: [[1, b], [a, b], [1]],
)


def pointwise_builders(op: torch._ops.OpOverload) -> tuple[Build, ...]:
    """Samples of a pointwise operator, from its schema: equal shapes, and some broadcast."""

    def build(draw: Draw, shapes: list[list[int]]) -> Sample:
        given = iter(shapes)
        args: list[Any] = []
        for argument in op._schema.arguments:
            kind = str(argument.type)
            if kind in ("Tensor", "Optional[Tensor]"):
                shape = next(given)
                boolean = argument.name in ("condition", "mask")
                # aten::masked_fill takes a value of no dimensions only.
                shape = [] if argument.name == "value" else shape
                args.append(draw.mask(*shape) if boolean else draw.real(*shape))
            elif argument.kwarg_only or argument.has_default_value():
                break
            elif kind in ("number", "float"):
                args.append(0.5)
            elif kind == "bool":
                args.append(False)
            else:
                args.append(1)
        return Sample(tuple(args))

    def builder(shape: Callable[[int, int], list[list[int]]]) -> Build:
        return lambda draw: build(draw, shape(draw.size(), draw.size()))

    tensors = sum(str(a.type) in ("Tensor", "Optional[Tensor]") for a in op._schema.arguments)
    return tuple(builder(s) for s in (POINTWISE_SHAPES if tensors > 1 else POINTWISE_SHAPES[:1]))


def unary(
    *args: Any, splits: int = 2, values: bool = True, backward: bool = True, **kwargs: Any
) -> Build:
    """``op(x, *args, **kwargs)`` of a matrix."""

    def build(draw: Draw) -> Sample:
        x = draw.real(draw.size(), draw.size())
        return Sample((x, *args), kwargs, splits, values, backward)

    return build


def cube(*args: Any, splits: int = 2, **kwargs: Any) -> Build:
    """``op(x, *args, **kwargs)`` of a tensor with three dimensions."""

    def build(draw: Draw) -> Sample:
        x = draw.real(draw.size(), draw.size(), draw.size())
        return Sample((x, *args), kwargs, splits)

    return build


def shaped(*shape: int, splits: int = 1, args: Sequence[Any] = (), **kwargs: Any) -> Build:
    """``op(x, *args, **kwargs)`` of a tensor of a given shape."""
    return lambda draw: Sample((draw.real(*shape), *args), kwargs, splits)


def written(size: int, start: int, end: int | None, step: int = 1, splits: int = 1) -> Build:
    """``slice_scatter`` into the last dimension of ``[4, size]``."""

    def build(draw: Draw) -> Sample:
        length = len(range(size)[start:end:step])
        return Sample((draw.real(4, size), draw.real(4, length), 1, start, end, step), {}, splits)

    return build


def many(*shapes: tuple[int, ...], splits: int = 1, args: Sequence[Any] = ()) -> Build:
    """``op([x, y, ...], *args)`` of tensors of given shapes."""
    return lambda draw: Sample(([draw.real(*shape) for shape in shapes], *args), {}, splits)


def pair(left: str, right: str, splits: int = 1) -> Build:
    """``op(x, y)`` of tensors whose dimensions are letters; equal letters have equal sizes."""

    def build(draw: Draw) -> Sample:
        sizes = {letter: draw.size() for letter in sorted({*left, *right} - {"1"})} | {"1": 1}
        return Sample(
            (draw.real(*(sizes[c] for c in left)), draw.real(*(sizes[c] for c in right))),
            splits=splits,
        )

    return build


def einsum(equation: str, splits: int) -> Build:
    """``einsum`` of an equation."""

    def build(draw: Draw) -> Sample:
        names = equation.partition("->")[0].replace(" ", "").split(",")
        sizes = {letter: draw.size() for letter in sorted(set("".join(names)))}
        tensors = [draw.real(*(sizes[c] for c in name)) for name in names]
        return Sample((equation, tensors), splits=splits)

    return build


def biased(shape: str, batched: bool = False, **kwargs: Any) -> Build:
    """``addmm`` or ``baddbmm`` with a bias of a given shape, in the letters of ``b m n``."""

    def build(draw: Draw) -> Sample:
        b, m, k, n = draw.size(), draw.size(), draw.size(), draw.size()
        sizes = {"b": b, "m": m, "n": n, "1": 1}
        batch = [b] if batched else []
        left, right = draw.real(*batch, m, k), draw.real(*batch, k, n)
        return Sample((draw.real(*(sizes[c] for c in shape)), left, right), kwargs, 3 + batched)

    return build


def attention(
    mask: str = "", *, grouped: bool = False, batched: bool = True, splits: int = 2, **kwargs: Any
) -> Build:
    """``scaled_dot_product_attention``; the mask's dimensions in the letters of ``b h s t``."""

    def build(draw: Draw) -> Sample:
        sizes = {"b": draw.size(), "h": draw.size(), "s": draw.size(), "t": draw.size(), "1": 1}
        batch = [sizes["b"]] if batched else []
        heads, width, group = sizes["h"], draw.choice(4, 8), draw.choice(2, 4)
        query_heads = heads * group if grouped else heads
        q = draw.real(*batch, query_heads, sizes["s"], width)
        k = draw.real(*batch, heads, sizes["t"], width)
        v = draw.real(*batch, heads, sizes["t"], width)
        given: dict[str, Any] = dict(kwargs)
        if grouped:
            given["enable_gqa"] = True
        if mask:
            shape = [sizes[c] for c in mask]
            if draw.choice(True, False):
                given["attn_mask"] = draw.real(*shape)
            else:
                given["attn_mask"] = draw.mask(*shape) | (torch.arange(shape[-1]) == 0)
        return Sample((q, k, v), given, splits)

    return build


def norm(dims: int, *, affine: bool, bias: bool) -> Build:
    """``layer_norm`` or ``rms_norm`` over the last dimensions."""

    def build(draw: Draw) -> Sample:
        shape = [draw.size() for _ in range(3)]
        whole = shape[3 - dims :]
        args: list[Any] = [draw.real(*shape), whole]
        if affine:
            args.append(draw.real(*whole))
        if bias:
            args.append(draw.real(*whole))
        return Sample(tuple(args), splits=3 - dims)

    return build


def embedding(*shape: int, padding: int | None = None, splits: int = 2, **kwargs: Any) -> Build:
    """``embedding`` of indices of a given shape, among them the first and the last row."""

    def build(draw: Draw) -> Sample:
        rows, width = draw.size(), draw.size()
        ids = draw.below(rows, *shape)
        ids.view(-1)[0], ids.view(-1)[-1] = 0, rows - 1
        given = dict(kwargs)
        if padding is not None:
            given["padding_idx"] = padding % rows
        return Sample((draw.real(rows, width), ids), given, splits)

    return build


def cross_entropy(
    *shape: int, batch: bool = True, weighted: bool = False, ignore: bool = True, **kwargs: Any
) -> Build:
    """``cross_entropy_loss``, some targets ignored; ``shape`` stands behind the classes."""

    def build(draw: Draw) -> Sample:
        classes = draw.size()
        lead = [draw.size()] if batch else []
        target = draw.below(classes, *lead, *shape)
        if batch and ignore:
            target.view(-1)[0] = kwargs.get("ignore_index", -100)
        weight = Fixed(draw.real(classes)) if weighted else None
        logits = 10 * draw.real(*lead, classes, *shape)
        return Sample((logits, target), {"weight": weight, **kwargs})

    return build


def probabilities(draw: Draw) -> Sample:
    """``cross_entropy_loss`` whose targets are probabilities."""
    rows, classes = draw.size(), draw.size()
    target = Fixed(draw.real(rows, classes).softmax(1))
    return Sample((draw.real(rows, classes), target), splits=0)


def view(draw: Draw) -> Sample:
    """A dimension is taken apart into a product, and two are joined."""
    a, b, c = draw.size(), draw.size(), draw.size()
    forms: list[tuple[list[int], list[int], int]] = [
        ([a, b * c], [a, b, c], 3),
        ([a, b, c], [a, b * c], 3),
        ([a * b, c], [a, b * c], 3),
        ([a, b], [a, 1, b, 1], 2),
        ([a, b], [-1, b], 2),
        ([a * b, c], [a, -1, c], 3),
        ([a, b * c], [-1], 2),
    ]
    shape, target, splits = draw.choice(*forms)
    return Sample((draw.real(*shape), target), splits=splits)


def view_across(draw: Draw) -> Sample:
    """``[4, 6] -> [6, 4]``: no axis is common but a factor at the left."""
    return Sample((draw.real(4, 6), [6, 4]), splits=0)


def view_as(draw: Draw) -> Sample:
    """A dimension is taken apart, or two are joined, as in another tensor."""
    a, b, c = draw.size(), draw.size(), draw.size()
    shapes = draw.choice(([a, b * c], [a, b, c]), ([a, b, c], [a, b * c]))
    return Sample(tuple(draw.real(*shape) for shape in shapes), splits=3)


def flatten(draw: Draw) -> Sample:
    """Some dimensions joined."""
    start, end = draw.choice((0, -1), (1, 2), (0, 1), (1, 1))
    return Sample((draw.real(draw.size(), draw.size(), draw.size()), start, end), splits=3)


def unflatten(draw: Draw) -> Sample:
    """One dimension taken apart."""
    a, b, c = draw.size(), draw.size(), draw.size()
    sizes = draw.choice([b, c], [-1, c], [b, -1], [b, 1, c])
    return Sample((draw.real(a, b * c), draw.choice(1, -1), sizes), splits=3)


def expand(draw: Draw) -> Sample:
    """Dimensions of one element repeated, and new ones in front."""
    a, b = draw.size(), draw.size()
    shape, target = draw.choice(
        ([a, 1], [a, b]), ([a, 1], [-1, b]), ([a], [b, a]), ([1, a], [b, b, -1]), ([a], [b, -1])
    )
    return Sample((draw.real(*shape), target))


def broadcast_to(draw: Draw) -> Sample:
    """``expand`` under its other name."""
    a, b = draw.size(), draw.size()
    shape, target = draw.choice(([a, 1], [a, b]), ([a], [b, a]))
    return Sample((draw.real(*shape), target))


def cross_joined(draw: Draw) -> Sample:
    """``cat`` of matrices along either dimension."""
    a, b, c = draw.size(), draw.size(), draw.size()
    dim = draw.choice(1, 0, -1)
    shapes = [[a, b], [a, c], [a, b]] if dim else [[b, a], [c, a], [b, a]]
    return Sample(([draw.real(*s) for s in shapes], dim), splits=3)


def sliced(draw: Draw) -> Sample:
    """The parts of ``[q | k | v]`` by their bounds, and slices that leave nothing out."""
    a, b = draw.size(), draw.size()
    bounds = draw.choice(
        (0, b), (b, 2 * b), (2 * b, 3 * b), (-b, None), (None, -b), (None, None), (0, 10**9)
    )
    return Sample((draw.real(a, 3 * b), draw.choice(1, -1), *bounds), splits=2)


def split_evenly(draw: Draw) -> Sample:
    """``split`` into parts of one size."""
    a, b = draw.size(), draw.size()
    return Sample((draw.real(a, 3 * b), b, draw.choice(1, -1)), splits=4)


def split_in(draw: Draw) -> Sample:
    """``split`` into parts of given sizes."""
    a, b, c = draw.size(), draw.size(), draw.size()
    return Sample((draw.real(b + 2 * c, a), [b, c, c]), splits=4)


def chunk(draw: Draw) -> Sample:
    """``chunk`` of a dimension into equal parts."""
    a, b, count = draw.size(), draw.size(), draw.choice(2, 3)
    return Sample((draw.real(a, count * b), count, draw.choice(1, -1)), splits=1 + count)


def repeat_interleave(draw: Draw) -> Sample:
    """Key heads repeated for the query heads of their group."""
    shape = (draw.size(), draw.size(), draw.size())
    return Sample((draw.real(*shape), draw.choice(2, 3), draw.choice(1, 0, -1)), splits=3)


def repeat_interleave_sized(draw: Draw) -> Sample:
    """The same where the caller says the size, which is that of all ranks together."""
    shape = (draw.size(), draw.size(), draw.size())
    times, dim = draw.choice(2, 3), draw.choice(1, 0, -1)
    size = {"output_size": shape[dim] * times}
    return Sample((draw.real(*shape), times, dim), size, splits=3)


def triangle(draw: Draw) -> Sample:
    """A batch of matrices, one half of each."""
    shape = (draw.size(), draw.size(), draw.size())
    return Sample((draw.real(*shape), draw.choice(0, 1, -1)), splits=1)


def stack(draw: Draw) -> Sample:
    """``stack`` of matrices."""
    a, b = draw.size(), draw.size()
    return Sample(([draw.real(a, b) for _ in range(2)], draw.choice(0, 1, -1)), splits=2)


def index_select(draw: Draw) -> Sample:
    """Rows, or columns, by their numbers."""
    a, b, dim = draw.size(), draw.size(), draw.choice(0, 1, -1)
    return Sample((draw.real(a, b), dim, draw.below((a, b)[dim], 5)))


def indexed(*given: bool) -> Build:
    """``x[i, :, j]``: where a dimension has an index."""

    def build(draw: Draw) -> Sample:
        shape = [draw.size() for _ in range(3)]
        indices = [
            draw.below(shape[d], 3) if d < len(given) and given[d] else None for d in range(len(given))
        ]
        return Sample((draw.real(*shape), indices), splits=3 - sum(given))

    return build


def index_put(shape: str, *given: bool, accumulate: bool = True, splits: int = 2) -> Build:
    """``x[i, :, j] += v`` for x of ``abc``; the values' dimensions in these letters and ``n``."""

    def build(draw: Draw) -> Sample:
        sizes = {"a": draw.size(), "b": draw.size(), "c": draw.size(), "n": 2, "1": 1}
        x = draw.real(sizes["a"], sizes["b"], sizes["c"])
        indices = [draw.below(x.shape[d], 2) if g else None for d, g in enumerate(given)]
        values = draw.real(*(sizes[letter] for letter in shape))
        if not accumulate:  # no place twice
            indices = [None if i is None else torch.tensor([1, 0]) for i in indices]
        return Sample((x, indices, values, accumulate), splits=splits)

    return build


def index_add(draw: Draw) -> Sample:
    """Rows, or columns, added to by their numbers."""
    a, b, dim = draw.size(), draw.size(), draw.choice(0, 1, -1)
    source = draw.real(3, b) if dim == 0 else draw.real(a, 3)
    return Sample((draw.real(a, b), dim, draw.below((a, b)[dim], 3), source), {"alpha": 2})


def gather(draw: Draw) -> Sample:
    """One element of each row, or of each column, and several."""
    a, b, dim, count = draw.size(), draw.size(), draw.choice(1, 0, -1), draw.choice(1, 3)
    shape = (count, b) if dim == 0 else (a, count)
    return Sample((draw.real(a, b), dim, draw.below((a, b)[dim], *shape)))


def gather_from_some(draw: Draw) -> Sample:
    """Of the first rows only: no axis of the operand is that of the result."""
    a, b = draw.size(), draw.size()
    return Sample((draw.real(a + 2, b), 1, draw.below(b, a, 3)), splits=0)


def scatter(source: bool) -> Build:
    """Elements of each row, or of each column, replaced, none twice."""

    def build(draw: Draw) -> Sample:
        a, b, dim = draw.size(), draw.size(), draw.choice(1, 0, -1)
        index = draw.real(a, b).argsort(dim).narrow(dim, 0, 2)
        value = draw.real(*index.shape) if source else 0.5
        return Sample((draw.real(a, b), dim, index, value))

    return build


def convolution(
    dims: int, *, groups: str = "1", bias: bool = True, batch: bool = True, **kwargs: Any
) -> Build:
    """``conv1d`` or ``conv2d``: plain, depthwise (as many groups as channels), or grouped."""

    def build(draw: Draw) -> Sample:
        i, o = draw.size(), draw.size()
        lead = [draw.size()] if batch else []
        count = {"1": 1, "2": 2, "all": i}[groups]
        o = i if groups == "all" else o
        x, w = draw.real(*lead, i, *[5] * dims), draw.real(o, i // count, *[3] * dims)
        b = draw.real(o) if bias else None
        splits = batch + {"1": 2, "2": 1, "all": 1}[groups]
        return Sample((x, w, b), {**kwargs, "groups": count}, splits)

    return build


def patches(dims: int, groups: int = 1) -> Build:
    """A convolution whose kernel tiles its input."""

    def build(draw: Draw) -> Sample:
        b, i, o = draw.size(), draw.size(), draw.size()
        x, w = draw.real(b, groups * i, *[8] * dims), draw.real(groups * o, i, *[4] * dims)
        bias, stride = draw.real(groups * o), [4] * dims
        splits = 2 + dims * 2  # batch, channels, places, and kernels
        return Sample((x, w, bias), {"stride": stride, "groups": groups}, splits)

    return build


def grouped_product(dtype: torch.dtype) -> Build:
    """Tokens in the order of their experts times each expert's matrix."""

    def build(draw: Draw) -> Sample:
        ends = torch.tensor([3, 3, 8], dtype=torch.int32)
        x, w = draw.real(8, 16).to(dtype), draw.real(3, 16, 48).to(dtype)
        return Sample((x, w, ends), splits=2, refined=dtype is torch.float64)

    return build


def as_real(draw: Draw) -> Sample:
    """Complex numbers as pairs."""
    return Sample((draw.real(draw.size(), draw.size(), 2),), splits=2, complex=True)


def same_as_other(draw: Draw) -> Sample:
    """``type_as``: the other lends its type only."""
    a, b = draw.size(), draw.size()
    return Sample((draw.real(a, b), draw.real(b, a)), splits=2)


ALONG_LAST = (unary(-1, splits=1), unary(0, splits=1), cube(1))
KEEPING = (unary(-1, True, splits=1), cube(0, False), cube(-1, True))
KEEPING_LIST = (unary([-1], True, splits=1), cube([0], False), cube([0, 2], True, splits=1))
SPREAD = (
    unary([-1], splits=1), unary([0], True, True, splits=1), cube([0, 2], False, splits=1),
    unary(None, splits=0),
)  # fmt: skip
CORRECTED = (
    unary([-1], correction=0, splits=1), unary([0], keepdim=True, splits=1),
    unary(splits=0), cube([0, 2], correction=2, splits=1),
)  # fmt: skip
TO_FLOAT = (unary(dtype=torch.float32),)

SAMPLES: dict[str, tuple[Build, ...]] = {
    "aten.linear.default": (pair("bak", "nk", 3), pair("k", "nk", 2), pair("abk", "k", 0)),
    "aten.addmm.default": (
        biased("n", beta=2, alpha=3), biased("mn"), biased("1n"), biased("m1"),
        biased("1"), biased("", beta=0.5), biased("n", beta=0),
    ),
    "aten.baddbmm.default": (
        biased("bmn", True, beta=2, alpha=3), biased("b1n", True), biased("11n", True),
        biased("n", True), biased("mn", True), biased("bm1", True, alpha=0.5),
        biased("1", True, beta=0),
    ),
    "aten.matmul.default": (
        pair("k", "k", 1), pair("mk", "k", 2), pair("k", "kn", 2), pair("mk", "kn", 3),
        pair("bmk", "kn", 4), pair("mk", "bkn", 4), pair("bmk", "bkn", 4), pair("bmk", "k", 3),
        pair("k", "bkn", 3), pair("bhmk", "hkn", 5), pair("b1mk", "hkn", 5),
    ),
    "aten.einsum.default": (
        einsum("mk,kn->mn", 3), einsum("bmk,bkn->bmn", 4), einsum("bqhd,bkhd->bhqk", 5),
        einsum("ij->ji", 2), einsum("ij->i", 2), einsum("i,i->", 1), einsum("i,j->ij", 2),
        einsum("ij, jk, kl -> il", 4), einsum("ij->", 2), einsum("...ij,jk->...ik", 6),
        einsum("ii->i", 0), einsum("mk,kn", 3), einsum("ibh,jbh->ijb", 4),
        lambda draw: Sample(("...ij,...jk->...ik", [draw.real(4, 6, 8), draw.real(8, 2)]), splits=4),
        lambda draw: Sample(("n...k,m...k", [draw.real(4, 6, 8), draw.real(2, 1, 8)]), splits=4),
    ),
    "aten.scaled_dot_product_attention.default": (
        attention(), attention(batched=False, splits=1), attention(is_causal=True),
        attention(scale=0.3), attention("st"), attention("b1st"), attention("bhst"),
        attention("1hst"), attention("1t"), attention(grouped=True, splits=3),
        attention("11st", grouped=True, splits=3),
        attention(grouped=True, batched=False, splits=2),
        attention(dropout_p=0.0),
    ),
    "aten._grouped_mm.default": (grouped_product(torch.float32),),
    "transformers.grouped_mm_fallback.default": (grouped_product(torch.float64),),
    "aten.conv1d.default": (
        patches(1), patches(1, groups=4),
        convolution(1), convolution(1, bias=False), convolution(1, groups="all", padding=[2]),
        convolution(1, groups="all", bias=False), convolution(1, groups="2"),
        convolution(1, batch=False, padding=[1]),
    ),
    "aten.conv2d.default": (
        patches(2), patches(2, groups=2),
        convolution(2, padding=[1, 1]), convolution(2, groups="all"),
        convolution(2, bias=False, stride=[2, 2]), convolution(2, groups="2", bias=False),
    ),
    # normalization
    "aten.layer_norm.default": (
        norm(1, affine=True, bias=True), norm(1, affine=True, bias=False),
        norm(1, affine=False, bias=False), norm(2, affine=True, bias=True),
    ),
    "aten.rms_norm.default": (
        norm(1, affine=True, bias=False), norm(1, affine=False, bias=False),
        norm(2, affine=True, bias=False),
    ),
    "aten.softmax.int": ALONG_LAST,
    "aten._softmax.default": (unary(-1, False, splits=1), cube(1, False)),
    "aten.log_softmax.int": ALONG_LAST,
    "aten.logsumexp.default": KEEPING_LIST,
    "aten.cumsum.default": ALONG_LAST,
    "aten.cumprod.default": ALONG_LAST,
    "aten.linalg_vector_norm.default": (
        unary(2, [-1], True, splits=1), unary(2, [0], splits=1), unary(splits=0),
        cube(1, [1, 2], splits=1),
    ),
    "aten.var.dim": SPREAD,
    "aten.var.correction": CORRECTED,
    "aten.std.dim": SPREAD,
    "aten.std.correction": CORRECTED,
    "aten.amax.default": (*KEEPING_LIST, unary(splits=0)),
    "aten.amin.default": (*KEEPING_LIST, unary(splits=0)),
    "aten.max.dim": KEEPING,
    "aten.min.dim": KEEPING,
    "aten.argmax.default": (*KEEPING, unary(splits=0)),
    "aten.any.dim": KEEPING,
    "aten.all.dim": KEEPING,
    "aten.sort.default": (*KEEPING, unary(splits=1)),
    "aten.topk.default": (unary(2, splits=1), unary(1, 0, splits=1), cube(2, 1, False)),
    "aten.flip.default": (unary([-1], splits=1), cube([0, 2], splits=1), unary([], splits=0)),
    "aten.roll.default": (
        unary([1], [-1], splits=1), cube([1, 1], [0, 2], splits=1), unary([1], splits=0),
    ),
    "aten.glu.default": (unary(splits=1), unary(0, splits=1), cube(1)),
    # reductions
    "aten.sum.dim_IntList": (
        unary([-1]), unary([0], True), cube([0, 2], splits=3), cube([-1], splits=3), unary([]),
        unary(None), unary(None, True),
    ),
    "aten.sum.default": (unary(), cube(splits=3)),
    "aten.mean.dim": (
        unary([-1]), unary([0], True), cube([0, 2], splits=3), cube([-1], splits=3), unary([]),
        unary(None), unary(None, True),
    ),
    "aten.mean.default": (unary(), cube(splits=3)),
    # lookups
    "aten.embedding.default": (
        embedding(5), embedding(2, 3), embedding(7, padding=0), embedding(7, padding=-1),
        embedding(5, scale_grad_by_freq=True, splits=0),
    ),
    "aten.cross_entropy_loss.default": (
        cross_entropy(), cross_entropy(batch=False), cross_entropy(3), cross_entropy(3, 2),
        cross_entropy(reduction=2), cross_entropy(reduction=0), cross_entropy(weighted=True),
        cross_entropy(3, weighted=True, reduction=0), cross_entropy(label_smoothing=0.1),
        cross_entropy(label_smoothing=0.2, weighted=True, reduction=2),
        cross_entropy(ignore_index=1), cross_entropy(ignore=False), probabilities,
    ),
    "aten.index_select.default": (index_select,),
    "aten.index.Tensor": (
        indexed(True), indexed(False, True), indexed(True, True), indexed(True, False, True),
        indexed(False, True, True), indexed(False, False, True),
    ),
    "aten.index_put.default": (
        index_put("nbc", True), index_put("bc", True), index_put("nc", True, True, splits=1),
        index_put("n1c", True), index_put("c", True, True, splits=1), index_put("1", True),
        index_put("nbc", True, accumulate=False), index_put("nb", True, False, True, splits=1),
        index_put("anc", False, True, splits=0), index_put("an", False, True, True, splits=0),
        index_put("c", False, True), index_put("abn", False, False, True, splits=0),
    ),
    "aten.index_add.default": (index_add,),
    "aten.gather.default": (gather, gather_from_some),
    "aten.scatter.src": (scatter(True),),
    "aten.scatter.value": (scatter(False),),
    "aten.view_as_complex.default": (shaped(4, 6, 2, splits=2),),
    "aten.view_as_real.default": (as_real,),
    # views
    "aten.view.default": (view, view_across),
    "aten._unsafe_view.default": (view,),
    "aten.reshape.default": (view, view_across),
    "aten.view_as.default": (view_as,),
    "aten.reshape_as.default": (view_as,),
    "aten.flatten.using_ints": (flatten, shaped(args=(0, -1), splits=0)),
    "aten.unflatten.int": (unflatten,),
    "aten.transpose.int": (cube(0, 1, splits=3), cube(-1, 1, splits=3), unary(0, 0)),
    "aten.permute.default": (cube([2, 0, 1], splits=3), cube([-1, 1, 0], splits=3)),
    "aten.t.default": (unary(), shaped(6)),
    "aten.numpy_T.default": (cube(splits=3), unary()),
    "aten.unsqueeze.default": (unary(0), unary(1), unary(-1)),
    "aten.squeeze.default": (shaped(1, 4, 1, 6, splits=2), unary()),
    "aten.squeeze.dim": (
        shaped(1, 4, 1, 6, splits=2, args=(2,)), shaped(4, 1, splits=1, args=(-1,)), unary(0)
    ),
    "aten.squeeze.dims": (shaped(1, 4, 1, 6, splits=2, args=([0, 2],)), unary([0, 1])),
    "aten.expand.default": (expand,),
    "aten.expand_as.default": (pair("a1", "ab", 2), pair("b", "ab", 2), pair("ab", "ab", 2)),
    "aten.broadcast_to.default": (broadcast_to,),
    "aten.repeat.default": (
        unary([2, 1]), unary([1, 3]), unary([2, 3]), unary([2, 1, 1]), unary([3, 1, 2]),
        shaped(4, 1, 6, splits=2, args=([1, 5, 1],)), unary([1, 1]),
    ),
    "aten.repeat_interleave.self_int": (
        repeat_interleave,
        repeat_interleave_sized,
        unary(2, splits=0),
    ),
    "aten.tril.default": (triangle,),
    "aten.triu.default": (triangle,),
    # structure
    "aten.slice.Tensor": (
        sliced, shaped(4, 12, splits=2, args=(1, 0, None, 2)),
        shaped(4, 12, splits=2, args=(1, 1, None, 2)), shaped(4, 12, splits=2, args=(1, 2, 12, 3)),
        shaped(4, 12, splits=1, args=(1, 3, 12, 2)), shaped(4, 12, splits=1, args=(1, 1, 4, 2)),
        shaped(4, 12, splits=1, args=(1, 0, 6, 2)), shaped(4, 12, splits=1, args=(1, 0, 11, 5)),
        shaped(4, 12, splits=1, args=(1, 5, 5)), shaped(4, 1, splits=1, args=(1, 0, 1)),
    ),
    "aten.slice_scatter.default": (
        written(12, 4, 8), written(12, 0, 4), written(12, 8, None), written(6, 0, 6, splits=2),
        written(12, 1, 9, 2), written(12, 5, 5), written(12, -4, None),
    ),
    "aten.select_scatter.default": (
        lambda draw: Sample((draw.real(4, 6), draw.real(4), 1, 2)),
        lambda draw: Sample((draw.real(4, 6, 2), draw.real(6, 2), -3, 0), splits=2),
    ),
    "aten.select.int": (unary(0, 1, splits=1), cube(1, -1), unary(-1, 0, splits=1)),
    "aten.unbind.int": (unary(splits=1), cube(1), cube(-1)),
    "aten.split.Tensor": (
        split_evenly, shaped(10, 6, splits=1, args=(4,)), shaped(4, 6, splits=2, args=(8,))
    ),
    "aten.split.sizes": (split_in,),
    "aten.split_with_sizes.default": (split_in,),
    "aten.chunk.default": (
        chunk, shaped(10, 6, splits=1, args=(3,)), shaped(4, 6, splits=2, args=(1,))
    ),
    "aten.cat.default": (
        cross_joined, many((4, 6), splits=2), many((4, 6), (0, 6), splits=2, args=(0,))
    ),
    "aten.concat.default": (cross_joined,),
    "aten.concatenate.default": (cross_joined,),
    "aten.stack.default": (stack,),
    "aten.pad.default": (
        unary([1, 1], splits=1), unary([0, 0, 1, 0], splits=1), cube([2, 0, 0, 0, 1, 1], splits=1),
        unary([-1, 0], splits=1), unary([1, 1], "constant", 2.0, splits=1),
    ),
    # no axis changes
    "aten.dropout.default": (unary(0.0, True), unary(0.5, False)),
    "aten.contiguous.default": (unary(),),
    "aten.clone.default": (unary(),),
    "aten.detach.default": (unary(),),
    "aten.alias.default": (unary(),),
    "aten.to.dtype": (unary(torch.float32), unary(torch.int64)),
    "aten.to.dtype_layout": TO_FLOAT,
    "aten.to.device": (unary(torch.device("cpu"), torch.float32),),
    "aten._to_copy.default": TO_FLOAT,
    "aten.type_as.default": (same_as_other,),
    "aten.zeros_like.default": (unary(),),
    "aten.ones_like.default": (unary(),),
    "aten.full_like.default": (unary(2.0),),
    "aten.empty_like.default": (unary(values=False),),
    "aten.rand_like.default": (unary(values=False),),
    "aten.bernoulli.p": (unary(1.0, backward=False), unary(0.0, backward=False)),
}  # fmt: skip
