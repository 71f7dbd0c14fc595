"""A model and its split twin on this rank, driven alike and compared after every move.

Every move returns what must be the same on all ranks.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.utils import _pytree as pytree

import autoshard
from autoshard import parameters as stored
from autoshard.signatures import plan_hash
from autoshard.verification import objective
from tests.fuzz.build import build, drops
from tests.fuzz.laws import CAPTURED, Shape, Values, distance, gradients_of, inputs_of, law, rounding
from tests.fuzz.spec import Net

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
Degree = str | int


class Pair:
    """The plain model and the split one, with equal parameters."""

    def __init__(
        self, spec: Net, tp: int, degree: Degree, plan: Path | None, training: bool, dtype: str
    ) -> None:
        self.spec, self.dtype = spec, DTYPES[dtype]
        self.plain = build(spec).to(self.dtype).train(training)
        given = copy.deepcopy(self.plain)
        example = inputs_of(spec, CAPTURED)
        self.split = autoshard.parallelize(
            given, tp, example, degree=degree, plan=plan, device="cpu", hardware="cpu"
        )

    def begin(self) -> str:
        """The whole parameters are the model's, bit for bit; the hash of plan and graph."""
        self.equal_state(exact=True)
        return plan_hash(self.split.plan, self.split._last.sharded)

    # -- moves -------------------------------------------------------------------------------------

    def same(self, shape: Shape, seed: int) -> str:
        """Outputs and gradients of one batch."""
        batch = inputs_of(self.spec, shape, seed)
        if drops(self.spec, self.plain.training):
            return self.random(batch)
        made, expected = self.ran(self.split, batch), self.ran(self.plain, batch)
        self.close(distance(made, expected), batch, "outputs and gradients")
        return digest(*made[0], *made[1].values())

    def random(self, batch: dict[str, Tensor]) -> str:
        """With dropout: the same function without it, and the same numbers on all ranks with it."""
        report = self.split.verify(batch)
        if not report.ok:
            limit = rounding(self.plain, batch, self.dtype)
            law(report.max_relative_error < limit, f"tp_model.verify: {report}; rounding {limit:.1e}")
        outputs, gradients = self.ran(self.split, batch)
        self.split.check_replicas()
        return digest(*outputs, *gradients.values())

    def mode(self, training: bool) -> str:
        """Train or eval."""
        self.plain.train(training)
        self.split.train(training)
        return self.same(CAPTURED, 1)

    def to(self, dtype: str) -> str:
        """Another dtype."""
        self.dtype = DTYPES[dtype]
        self.plain.to(self.dtype)
        self.split.to(self.dtype)
        self.equal_state(exact=True)
        return self.same(CAPTURED, 2)

    def train(self, shape: Shape, seed: int, optimizer: str, clip: bool) -> str:
        """Two steps of an optimizer on both; then parameters are compared."""
        if drops(self.spec, self.plain.training):
            return self.same(shape, seed)
        norms = []
        for model in (self.plain, self.split):
            trained = [p for p in model.parameters() if p.requires_grad]
            made = (
                torch.optim.AdamW(trained, lr=1e-2, eps=1e-2)
                if optimizer == "adamw"
                else torch.optim.SGD(trained, lr=1e-2, momentum=0.9)
            )
            for turn in range(2):
                made.zero_grad()
                self.backward(model, inputs_of(self.spec, shape, seed + turn))
                if clip:
                    norm = clip_grad_norm_(trained, 1.0)
                    norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
                made.step()
        batch = inputs_of(self.spec, shape, seed)
        if clip:
            self.close(distance((norms[2:], {}), (norms[:2], {})), batch, "norms of gradients")
        self.equal_state(exact=False, batch=batch)
        self.plain.load_state_dict(self.split.full_state_dict())
        for model in (self.plain, self.split):
            model.zero_grad()
        self.split.check_replicas()
        return digest(*norms[2:], *self.plain.state_dict().values())

    def reload(self, how: str, folder: Path) -> str:
        """Parameters out of one model and into the other, or through a file."""
        if how == "file":
            file, state = folder / "model.safetensors", self.split.full_state_dict(rank0_only=True)
            if not dist.is_initialized() or dist.get_rank() == 0:
                save_file({n: t.clone().contiguous() for n, t in state.items()}, file)
            if dist.is_initialized():
                dist.barrier()
            law(bool(state) == (not dist.is_initialized() or dist.get_rank() == 0), "rank0_only")
            read = load_file(file)
            equal(read, self.plain.state_dict(), "through safetensors")
            self.plain.load_state_dict(read)
        elif how == "other values":
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for p in self.plain.parameters():
                    p.mul_(1 + 0.1 * torch.rand(p.shape, generator=generator).to(p.dtype))
            self.split.load_state_dict(self.plain.state_dict())
        elif how == "own":
            before = {n: t.clone() for n, t in self.split.state_dict().items()}
            with torch.no_grad():
                for p in self.split.parameters():
                    p.zero_()
            self.split.load_state_dict(before)
        elif how == "copy":
            self.split = copy.deepcopy(self.split)
        self.equal_state(exact=True)
        return self.same(CAPTURED, 4)

    def string_hash(self) -> int:
        """What differs among rank processes, as it does among a user's."""
        return hash("a string")

    # -- inside ------------------------------------------------------------------------------------

    def backward(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
        """Flat whole outputs, with gradients in the parameters."""
        outputs = pytree.tree_leaves(model(**{n: t.clone() for n, t in batch.items()}))
        whole = [o.full_tensor() if isinstance(o, DTensor) else o for o in outputs]
        objective(whole).backward()
        return [o.detach() for o in whole]

    def ran(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Values:
        """Outputs and whole gradients, in the model's order."""
        model.zero_grad()
        outputs = self.backward(model, batch)
        for (name, p), (_, q) in zip(
            self.plain.named_parameters(), self.split.named_parameters(), strict=True
        ):
            law(p.requires_grad == q.requires_grad, f"{name} is trained on one side only")
        if model is self.plain:
            return outputs, gradients_of(model)
        gradients = {}
        for name, p in model.named_parameters():
            share = self.split.share_of(name)
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            gradients[name] = stored.whole(gradient, share).detach().clone()
        return outputs, gradients

    def close(self, errors: dict[str, float], batch: dict[str, Tensor], what: str) -> None:
        """All errors are rounding."""
        worst = max(
            errors, key=lambda n: float("inf") if errors[n] != errors[n] else errors[n], default=""
        )
        if worst and not errors[worst] < 1e-10:
            limit = rounding(self.plain, batch, self.dtype)
            law(
                errors[worst] < limit,
                f"{what}: {worst} differs by {errors[worst]:.1e}, rounding {limit:.1e}",
            )

    def equal_state(self, exact: bool, batch: dict[str, Tensor] | None = None) -> None:
        """The state dicts have the same names, shapes, dtypes and numbers."""
        whole, plain = self.split.full_state_dict(), self.plain.state_dict()
        law(list(self.split.state_dict()) == list(plain), "names of state_dict")
        if exact:
            equal(whole, plain, "full_state_dict")
        elif batch is not None:
            self.close(distance(([], whole), ([], dict(plain))), batch, "parameters after a step")


def equal(made: dict[str, Tensor], expected: dict[str, Any], what: str) -> None:
    """The same names, and the same tensors bit for bit."""
    law(set(made) == set(expected), f"{what}: names {set(made) ^ set(expected)}")
    for name, tensor in expected.items():
        other = made[name]
        law(other.dtype == tensor.dtype and torch.equal(other, tensor), f"{what}: {name}")


def digest(*tensors: Tensor) -> str:
    """A hash of all bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
