"""Programs: what models do to activations, an operation at a time, on values [batch, sequence, *dims].

A step returns the value or values that it adds, or None where it does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz.spec import Step
from tests.fuzz.spec import Steps as Spec

SIZES = (16, 8, 24, 32, 12, 48, 6)
LARGEST = 192  # elements of a value at one position
DEEPEST = 3  # dimensions behind batch and sequence

Result = Tensor | tuple[Tensor, ...] | None
STEPS: dict[str, Callable[[Call, Tensor], Result]] = {}


def step(function: Callable[[Call, Tensor], Result]) -> Callable[[Call, Tensor], Result]:
    """Enter a step under its name."""
    STEPS[function.__name__.rstrip("_")] = function
    return function


class Call:
    """A step where it stands: its module's parameters, and the values so far."""

    def __init__(self, module: Program, index: int, values: list[Tensor], used: set[int]) -> None:
        self.module, self.index, self.values, self.used = module, index, values, used
        self.step: Step = module.steps[index]
        self.n = self.step.n
        self.made = 0

    @property
    def size(self) -> int:
        """A size for a new dimension."""
        return SIZES[self.n % len(SIZES)]

    def pick(self, choices: Any) -> Any:
        """One of the choices."""
        return choices[self.n % len(choices)]

    def weight(self, *shape: int) -> Tensor:
        """A parameter of this step's own."""
        self.made += 1
        name = f"{self.step.op}_{self.index}_{self.made}"
        return self.module.made(name, shape)

    def constant(self, size: int) -> Tensor:
        """A buffer of this step's own."""
        name = f"constant_{self.index}"
        if not hasattr(self.module, name):
            self.module.register_buffer(name, torch.linspace(-1, 1, size))
        found: Tensor = getattr(self.module, name)
        return found

    def other(self, x: Tensor) -> Tensor:
        """Another value with the dims of x; x where there is none."""
        places = [i for i, v in enumerate(self.values) if v.shape[2:] == x.shape[2:] and v is not x]
        if not places:
            return x
        place = places[-1 - self.step.other % len(places)]
        self.used.add(place)
        return self.values[place]


class Program(nn.Module):
    """A linear layer, the steps, and a linear layer back."""

    def __init__(self, spec: Spec, hidden: int) -> None:
        super().__init__()
        self.steps = spec.steps
        self.join = spec.join
        self.entry = nn.Linear(hidden, spec.width)
        self.exit = nn.Identity()
        self.effective: set[int] = set()  # places of the steps that make a value
        with torch.no_grad():
            width = self.run(torch.zeros(2, 3, hidden)).shape[-1]
        self.exit = nn.Linear(width, hidden, bias=False)

    def made(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The parameter of this name."""
        if name not in self._parameters:
            scale = 1 / math.sqrt(max(shape[-2:], default=1))
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * scale))
        found: Tensor = getattr(self, name)
        return found

    def run(self, x: Tensor) -> Tensor:
        """The values behind the entry, [batch, sequence, width]."""
        values = [self.entry(x)]
        used: set[int] = set()
        for index, each in enumerate(self.steps):
            call = Call(self, index, values, used)
            place = len(values) - 1 - each.at % len(values)
            result = STEPS[each.op](call, values[place])
            results = result if isinstance(result, tuple) else (result,)
            kept = [r for r in results if r is not None]
            if kept and all(fits(r) for r in kept):
                used.add(place)
                self.effective.add(index)
                values = [*values, *kept]
        ends = [v for i, v in enumerate(values) if i not in used] if self.join else values[-1:]
        return torch.cat([v.flatten(2) if v.dim() > 2 else v[..., None] for v in ends], -1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.exit(self.run(x))
        return out


def fits(x: Tensor) -> bool:
    """Not too large to go on with."""
    return math.prod(x.shape[2:]) <= LARGEST and 1 <= x.dim() - 2 <= DEEPEST


def causal(length: int) -> Tensor:
    """Which position sees which."""
    return torch.ones(length, length, dtype=torch.bool).tril()


# -- weights ---------------------------------------------------------------------------------------


@step
def linear(c: Call, x: Tensor) -> Result:
    return F.linear(x, c.weight(c.size, x.shape[-1]), c.weight(c.size) if c.n % 2 else None)


@step
def matmul(c: Call, x: Tensor) -> Result:
    return x @ c.weight(x.shape[-1], c.size)


@step
def again(c: Call, x: Tensor) -> Result:
    """A weight that stands elsewhere already, or its transpose."""
    weights = [p for p in c.module.parameters(recurse=False) if p.dim() == 2]
    weights.append(c.module.entry.weight)
    size = x.shape[-1]
    fitting = [w.t() for w in weights if w.shape[0] == size] + [
        w for w in weights if w.shape[1] == size
    ]
    return (
        F.linear(x, c.pick([w.t() if w.shape[1] != size else w for w in fitting])) if fitting else None
    )


@step
def addmm(c: Call, x: Tensor) -> Result:
    if x.dim() != 3:
        return None
    made = torch.addmm(c.weight(c.size), x.flatten(0, 1), c.weight(x.shape[-1], c.size))
    return made.view(*x.shape[:2], c.size)


@step
def heads(c: Call, x: Tensor) -> Result:
    """A weight for each of the last dimension but one."""
    if x.dim() < 4:
        return None
    return torch.einsum("...he,hef->...hf", x, c.weight(*x.shape[-2:], c.pick((4, 8, 6))))


@step
def contract(c: Call, x: Tensor) -> Result:
    """Two dimensions are summed at once."""
    if x.dim() < 4:
        return None
    return torch.einsum("...he,hef->...f", x, c.weight(*x.shape[-2:], c.size))


@step
def tensordot(c: Call, x: Tensor) -> Result:
    return torch.tensordot(x, c.weight(x.shape[-1], 2, c.pick((4, 8, 3))), 1)


@step
def scale(c: Call, x: Tensor) -> Result:
    return x * c.weight(x.shape[-1])


@step
def shift(c: Call, x: Tensor) -> Result:
    return x + c.weight(*x.shape[2:])


@step
def scalar(c: Call, x: Tensor) -> Result:
    return c.pick((x * c.weight(), x + c.weight(), x * (1 + c.weight(1))))


@step
def head_scale(c: Call, x: Tensor) -> Result:
    return x * c.weight(x.shape[-2], 1) if x.dim() > 3 else None


@step
def constant(c: Call, x: Tensor) -> Result:
    return x * c.constant(x.shape[-1])


@step
def normalized_weight(c: Call, x: Tensor) -> Result:
    w = c.weight(c.size, x.shape[-1])
    return F.linear(x, F.normalize(w, dim=c.n % 2) if c.n % 3 else w / w.norm())


# -- one value -------------------------------------------------------------------------------------


@step
def act(c: Call, x: Tensor) -> Result:
    function = c.pick((F.gelu, F.relu, F.silu, torch.tanh, torch.sigmoid, torch.sin, F.softplus))
    return function(x)


@step
def arithmetic(c: Call, x: Tensor) -> Result:
    return c.pick(
        (-x, x * 0.5, 1 - x, x + 1, x / 2, x.square(), x.abs(), 1 / (1 + x * x), x.clamp(-1, 1))
    )


@step
def softmax(c: Call, x: Tensor) -> Result:
    return c.pick((x.softmax(-1), x.log_softmax(-1), F.normalize(x, dim=-1, eps=1e-3), x.softmax(2)))


@step
def norm(c: Call, x: Tensor) -> Result:
    size = x.shape[-1:]
    if c.n % 4 == 0:
        return F.layer_norm(x, size, c.weight(*size), c.weight(*size))
    if c.n % 4 == 1:
        return F.rms_norm(x, size, c.weight(*size), 1e-3)
    if c.n % 4 == 2:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * c.weight(*size)
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-2).sqrt()


@step
def reduced(c: Call, x: Tensor) -> Result:
    """Over the last dimension, or the one before."""
    dim = -1 if x.dim() < 4 or c.n % 2 else -2
    function = c.pick((Tensor.sum, Tensor.mean, Tensor.amax, Tensor.logsumexp, Tensor.sum, Tensor.norm))
    if function is Tensor.norm:
        return x.norm(dim=dim, keepdim=True)
    return function(x, dim, keepdim=x.dim() < 4 or c.n % 3 == 0)


@step
def centred(c: Call, x: Tensor) -> Result:
    """A reduction that the value itself meets again."""
    return c.pick(
        (
            x - x.mean(-1, keepdim=True),
            x / (1 + x.abs().sum(-1, keepdim=True)),
            x - x.amax(-1, keepdim=True),
        )
    )


@step
def running(c: Call, x: Tensor) -> Result:
    return c.pick((x.cumsum(-1), x.cumsum(1) * 0.3, x.sort(-1).values, x.flip(-1)))


@step
def top(c: Call, x: Tensor) -> Result:
    return x.topk(min(2, x.shape[-1]), -1).values


@step
def dropout(c: Call, x: Tensor) -> Result:
    return F.dropout(x, c.pick((0.1, 0.0, 0.5)), c.module.training)


@step
def cast(c: Call, x: Tensor) -> Result:
    return c.pick((x.float().tanh().to(x.dtype), x.to(torch.float32).to(x.dtype), x.type_as(x)))


@step
def cut_off(c: Call, x: Tensor) -> Result:
    """No gradient flows through one use."""
    if c.n % 3 == 0:
        return x * x.detach()
    if c.n % 3 == 1:
        return x.detach() * 0.5 + c.other(x)
    with torch.no_grad():
        held = x.sigmoid()
    return x * held


# -- shapes ----------------------------------------------------------------------------------------


@step
def split(c: Call, x: Tensor) -> Result:
    parts = c.pick((2, 4, 3))
    if x.shape[-1] % parts:
        return None
    if c.n % 2:
        return tuple(x.chunk(parts, -1))
    return tuple(x.split(x.shape[-1] // parts, -1))


@step
def uneven(c: Call, x: Tensor) -> Result:
    first = c.pick((4, 8, 2, 1))
    return tuple(x.split([first, x.shape[-1] - first], -1)) if x.shape[-1] > first else None


@step
def cut(c: Call, x: Tensor) -> Result:
    size = x.shape[-1]
    return c.pick(
        (x[..., : (size + 1) // 2], x[..., size // 2 :], x[..., ::2], x[..., 1:], x[..., :-1])
    )


@step
def unflatten(c: Call, x: Tensor) -> Result:
    count = c.pick((2, 4, 3, 8))
    if x.shape[-1] % count:
        return None
    inner = x.shape[-1] // count
    return x.unflatten(-1, (count, inner)) if c.n % 2 else x.view(*x.shape[:-1], inner, count)


@step
def flatten(c: Call, x: Tensor) -> Result:
    return x.flatten(-2) if x.dim() > 3 else None


@step
def transpose(c: Call, x: Tensor) -> Result:
    if x.dim() < 4:
        return None
    return x.transpose(-1, -2) if c.n % 2 else x.movedim(-1, 2)


@step
def regroup(c: Call, x: Tensor) -> Result:
    """Heads out of the middle: flattened across a transpose."""
    if x.dim() < 4:
        return None
    return x.transpose(-1, -2).reshape(*x.shape[:-2], -1)


@step
def unbind(c: Call, x: Tensor) -> Result:
    if x.dim() < 4:
        return None
    return x.unbind(-2)[:4] if c.n % 2 else (x[..., 0, :], x[..., -1, :])


@step
def widen(c: Call, x: Tensor) -> Result:
    """Each element several times."""
    count = c.pick((2, 3))
    if c.n % 4 == 0:
        return x.repeat_interleave(count, -1)
    if c.n % 4 == 1:
        return x.repeat(*[1] * (x.dim() - 1), count)
    if c.n % 4 == 2:
        return x.unsqueeze(-2).expand(*x.shape[:-1], count, x.shape[-1])
    return x.unsqueeze(-1).expand(*x.shape, count).flatten(-2)


@step
def pad(c: Call, x: Tensor) -> Result:
    return c.pick((F.pad(x, (0, 4)), F.pad(x, (2, 2)), F.pad(x, (0, -1)) if x.shape[-1] > 1 else x))


@step
def indexed(c: Call, x: Tensor) -> Result:
    size = x.shape[-1]
    places = c.pick(([0], [0, size // 2], list(range(size))[::-1], [size - 1, 0, 0]))
    if c.n % 2:
        return x[..., places]
    return x.index_select(-1, torch.tensor(places))


@step
def rolled(c: Call, x: Tensor) -> Result:
    return c.pick(
        (x.roll(1, -1), x.roll(1, 1), F.pad(x.flatten(2), (0, 0, 1, 0))[:, :-1].view(x.shape))
    )


# -- several values --------------------------------------------------------------------------------


@step
def pair(c: Call, x: Tensor) -> Result:
    y = c.other(x)
    return c.pick((x + y, x * y, x - y, torch.maximum(x, y), x * y.sigmoid(), torch.where(x > 0, x, y)))


@step
def lerp(c: Call, x: Tensor) -> Result:
    gate = c.weight(x.shape[-1]).sigmoid()
    return gate * x + (1 - gate) * c.other(x)


@step
def cat(c: Call, x: Tensor) -> Result:
    y = c.other(x)
    if c.n % 3 == 0:
        return torch.cat([x, y], -1)
    if c.n % 3 == 1:
        return torch.cat([y, x * 0.5, y], -1)
    return torch.cat([x, y], 2)


@step
def stack(c: Call, x: Tensor) -> Result:
    made = torch.stack([x, c.other(x)], c.pick((-1, -2, 2)))
    return made.sum(-2) if c.n % 2 else made


@step
def product(c: Call, x: Tensor) -> Result:
    """Outer and inner products within a position."""
    y = c.other(x)
    if x.dim() == 3:
        return torch.einsum("bsi,bsj->bsij", x, y) if c.n % 2 else (x * y).sum(-1, keepdim=True)
    return x @ y.transpose(-1, -2) if c.n % 2 else torch.einsum("...he,...he->...h", x, y)


@step
def attend(c: Call, x: Tensor) -> Result:
    """Positions see each other, by head where there are heads."""
    if x.dim() > 4:
        return None
    y = c.other(x)
    query, key = (t.unsqueeze(2) if t.dim() == 3 else t for t in (x, y))
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    mask = causal(x.shape[1])
    if c.n % 3 == 0:
        out = F.scaled_dot_product_attention(query, key, key, is_causal=True)
    elif c.n % 3 == 1:
        scores = query @ key.transpose(-1, -2) / math.sqrt(x.shape[-1])
        out = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ query
    else:
        flat = query.reshape(-1, *query.shape[2:])
        scores = torch.bmm(flat, key.reshape(-1, *key.shape[2:]).transpose(1, 2))
        scores = scores + torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, float("-inf"))
        out = torch.bmm(scores.softmax(-1), flat).view(query.shape)
    return out.transpose(1, 2).reshape(x.shape)


@step
def convolve(c: Call, x: Tensor) -> Result:
    """Over the sequence, by channel or over all channels."""
    if x.dim() != 3:
        return None
    size = x.shape[-1]
    lanes = F.pad(x.transpose(1, 2), (2, 0))
    if c.n % 2:
        return F.conv1d(lanes, c.weight(size, 1, 3), c.weight(size), groups=size).transpose(1, 2)
    return F.conv1d(lanes, c.weight(c.size, size, 3)).transpose(1, 2)


# -- written in place ------------------------------------------------------------------------------


@step
def write(c: Call, x: Tensor) -> Result:
    y, size = c.other(x), x.shape[-1]
    half = (size + 1) // 2
    made = x.clone()
    if c.n % 6 == 0:
        made[..., :half] = y[..., size - half :]
    elif c.n % 6 == 1:
        made[..., half:].mul_(0.5)
    elif c.n % 6 == 2:
        made.add_(y).mul_(0.5)
    elif c.n % 6 == 3:
        made = torch.zeros_like(x)
        made[..., ::2] += y[..., ::2]
    elif c.n % 6 == 4:
        made = torch.empty_like(x)
        made.copy_(y)
        made[..., 0] = 0.0
    else:
        view = made.flatten(2)
        view[:, :, [0]] = 1.0
        made = made + y
    return made


@step
def masked(c: Call, x: Tensor) -> Result:
    places = torch.arange(x.shape[-1])
    steps = torch.arange(x.shape[1]).view(1, -1, *[1] * (x.dim() - 2))
    if c.n % 4 == 0:
        return x.masked_fill(places % 3 == 1, 0.0)
    if c.n % 4 == 1:
        return torch.where(steps > 1, x, 0.5)
    if c.n % 4 == 2:
        filled = x.masked_fill(places > x.shape[-1] // 2, float("-inf"))
        return filled.softmax(-1)
    return x.clone().masked_fill_(steps % 2 == 0, 1.0)
