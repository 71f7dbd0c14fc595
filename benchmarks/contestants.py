"""Who takes part in `benchmarks/step.py`: one model, and each way to run its training step.

A contestant is made from the whole model, which is drawn from one seed on every rank; it may take the
model apart. `check` compares its loss and the gradient of every parameter with the model's own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import autoshard
from autoshard.measures import TOLERANCE, relative_error
from benchmarks.by_hand import HandGPT, share
from benchmarks.by_hand_sequence import SequenceGPT
from benchmarks.by_libraries import by_dtensors, by_megatron
from benchmarks.models import Shape, build, tokens
from benchmarks.without_communication import silence


@dataclass(frozen=True)
class Setting:
    """Where and at what size.

    Attributes:
        shape: of the model and of the batch.
        backend: of torch.compile.
        alone: the other ranks are not there: collectives are called and nothing answers.
    """

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    backend: str
    rank: int = 0
    world: int = 1
    alone: bool = False

    @property
    def compiling(self) -> dict[str, Any]:
        """Options of torch.compile: sizes are those of this benchmark, for everybody."""
        return {"backend": self.backend, "dynamic": False}


@dataclass(frozen=True)
class Contestant:
    """A step that can be run again and again.

    Attributes:
        model: called with the batch, gives the loss or an output that has it.
        parameters: under the names of the whole model.
        compiled: some of it by torch.compile.
        around: a context in which forward and backward run.
    """

    model: Callable[..., Any]
    parameters: Mapping[str, nn.Parameter]
    batch: Mapping[str, Tensor]
    compiled: bool = False
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def step(self) -> Tensor:
        """One forward and backward from no gradients; the loss."""
        self.drop_gradients()
        with self.around():
            output = self.model(**self.batch)
            loss: Tensor = output if isinstance(output, Tensor) else output.loss
            loss.backward()
        return loss.detach()

    def drop_gradients(self) -> None:
        """Give the memory of the gradients back."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def parameter_bytes(self) -> int:
        """What this rank holds."""
        return sum(local(p.detach()).nbytes for p in self.parameters.values())


Make = Callable[[Setting, nn.Module, Mapping[str, Tensor]], Contestant]


@dataclass(frozen=True)
class Entry:
    """A line of the table of contestants.

    Attributes:
        family: of which model: ``gpt``, ``hf-gpt2`` or ``hf-llama``.
        ranks: ``one`` process, ``many``, or ``any``.
        checked: it computes the model, so it can be compared.
    """

    make: Make
    family: str = "gpt"
    ranks: str = "any"
    checked: bool = True


# -- models --------------------------------------------------------------------------------------


def whole(family: str, s: Setting) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model of a family, in train mode, the same on every rank, and its batch."""
    torch.manual_seed(0)
    with s.device:
        model = build(s.shape) if family == "gpt" else _hugging_face(family, s.shape)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
    batch = tokens(s.shape.vocabulary, s.shape.batch, s.shape.sequence, str(s.device))
    if family != "gpt":
        batch = {"input_ids": batch["ids"], "labels": batch["ids"]}
    return model.to(s.dtype).train(), batch


def _hugging_face(family: str, shape: Shape) -> nn.Module:
    import transformers

    common = {
        "vocab_size": shape.vocabulary, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    if family == "hf-gpt2":
        config = transformers.GPT2Config(
            n_embd=shape.hidden, n_head=shape.heads, n_layer=shape.layers, n_positions=shape.sequence,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden, num_attention_heads=shape.heads, num_hidden_layers=shape.layers,
        num_key_value_heads=next(n for n in (4, 3, 2, 1) if shape.heads % n == 0),
        intermediate_size=-(-8 * shape.hidden // 3 // 256) * 256,
        max_position_embeddings=shape.sequence, **common,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


# -- contestants ---------------------------------------------------------------------------------


def _compiled(s: Setting, model: nn.Module, how: str) -> Callable[..., Any]:
    """`model`; it compiled in one graph, that also as CUDA graphs; each repeated layer compiled."""
    if how == "whole":
        return torch.compile(model, **s.compiling)
    if how == "graphs":
        mode = {"mode": "reduce-overhead"} if s.backend == "inductor" else {}
        return torch.compile(model, **s.compiling, **mode)
    if how == "layers":
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        if not lists:
            raise ValueError("no ModuleList, so no repeated layers to compile")
        for layer in (layer for layers in lists for layer in layers):
            layer.compile(fullgraph=True, **s.compiling)
    return model


def _plain(s: Setting, model: nn.Module, batch: Any, how: str = "") -> Contestant:
    return Contestant(_compiled(s, model, how), dict(model.named_parameters()), batch, bool(how))


def _autoshard(
    s: Setting, model: nn.Module, batch: Any, how: str = "", silent: bool = False
) -> Contestant:
    # NCCL launches slower on a communicator that some CUDA graph has recorded: they get their own.
    mesh = None
    if how == "graphs" and s.world > 1 and not s.alone:
        mesh = DeviceMesh.from_group(dist.new_group(), s.device.type, mesh_dim_names=("tp",))
    split = autoshard.parallelize(
        model, s.world, batch, degree="max", device=s.device, check_inputs=False, mesh=mesh
    )
    if silent:
        silence(split)
    return Contestant(_compiled(s, split, how), dict(split.named_parameters()), batch, bool(how))


def _hand(s: Setting, model: Any, batch: Any, overlap: bool = False, how: str = "") -> Contestant:
    return _plain(s, HandGPT(model, overlap), batch, how)


def _sequence(s: Setting, model: Any, batch: Any, how: str = "") -> Contestant:
    return _plain(s, SequenceGPT(model), batch, how)


def _megatron(s: Setting, model: Any, batch: Any) -> Contestant:
    return _plain(s, by_megatron(model, s.device), batch)


def _dtensor(s: Setting, model: Any, batch: Any, how: str = "") -> Contestant:
    from torch.distributed.tensor.parallel import loss_parallel

    made = by_dtensors(model, s.device)
    parameters = dict(made.named_parameters())
    return Contestant(_compiled(s, made, how), parameters, batch, bool(how), loss_parallel)


CONTESTANTS: dict[str, Entry] = {
    "plain": Entry(_plain),
    "plain-compiled": Entry(partial(_plain, how="whole"), ranks="one"),
    "limit": Entry(partial(_autoshard, silent=True), ranks="many", checked=False),
    "limit-compiled": Entry(partial(_autoshard, how="whole", silent=True), ranks="many", checked=False),
    "autoshard": Entry(_autoshard),
    "autoshard-compiled": Entry(partial(_autoshard, how="whole")),
    "limit-graphs": Entry(partial(_autoshard, how="graphs", silent=True), ranks="many", checked=False),
    "autoshard-graphs": Entry(partial(_autoshard, how="graphs")),
    "autoshard-layers": Entry(partial(_autoshard, how="layers")),
    "hand": Entry(_hand, ranks="many"),
    "hand-layers": Entry(partial(_hand, how="layers"), ranks="many"),
    "hand-overlap": Entry(partial(_hand, overlap=True), ranks="many"),
    "hand-sequence": Entry(_sequence, ranks="many"),
    "hand-sequence-layers": Entry(partial(_sequence, how="layers"), ranks="many"),
    "megatron": Entry(_megatron, ranks="many"),
    "dtensor": Entry(_dtensor, ranks="many"),
    "dtensor-compiled": Entry(partial(_dtensor, how="layers"), ranks="many"),
}
for _family in ("hf-gpt2", "hf-llama"):
    CONTESTANTS |= {
        _family: Entry(_plain, _family, "one"),
        f"{_family}-compiled": Entry(partial(_plain, how="whole"), _family, "one"),
        f"autoshard-{_family}": Entry(_autoshard, _family, "one"),
        f"autoshard-{_family}-compiled": Entry(partial(_autoshard, how="whole"), _family, "one"),
    }


def that_fit(world: int) -> list[str]:
    """The contestants of a world of this size, in the order of the table."""
    wanted = ("any", "one" if world == 1 else "many")
    return [name for name, entry in CONTESTANTS.items() if entry.ranks in wanted]


# -- are they right? -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What the whole model gives: the loss, and every gradient by name."""

    loss: float
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class Agreement:
    """How far a contestant is from the whole model, on the rank that is farthest."""

    loss_error: float
    gradient_error: float
    worst: str
    tolerance: float

    @property
    def ok(self) -> bool:
        """Both within the tolerance; NaN is not."""
        return self.loss_error <= self.tolerance and self.gradient_error <= self.tolerance


def make(name: str, s: Setting) -> Contestant:
    """The contestant, ready to run."""
    entry = CONTESTANTS[name]
    return entry.make(s, *whole(entry.family, s))


def reference(family: str, s: Setting) -> Reference:
    """The whole model's loss and gradients, run on this rank alone."""
    alone = _plain(s, *whole(family, s))
    loss = alone.step().item()
    gradients = {n: p.grad.detach() for n, p in alone.parameters.items() if p.grad is not None}
    for name, gradient in list(gradients.items()):
        if ".qkv." in name:  # also as three
            stem, _, kind = name.rpartition(".")
            gradients |= {
                f"{stem}.{n}.{kind}": part for n, part in zip("qkv", gradient.chunk(3), strict=True)
            }
    return Reference(loss, gradients)


def check(contestant: Contestant, s: Setting, expected: Reference) -> Agreement:
    """One step against the whole model's: the loss, and this rank's share of every gradient."""
    loss = local(contestant.step()).item()
    largest = max(g.abs().max().item() for g in expected.gradients.values())
    errors = {}
    for name, parameter in contestant.parameters.items():
        mine = expected.gradients[name]
        if local(parameter).shape != mine.shape:
            mine = share(name, mine, s.rank, s.world)
        if parameter.grad is None:
            errors[name] = float("inf")
        else:
            error = relative_error([local(parameter.grad)], mine, largest)
            errors[name] = float("inf") if math.isnan(error) else error
    contestant.drop_gradients()
    worst = max(errors, key=lambda name: errors[name])
    off = abs(loss - expected.loss) / abs(expected.loss)
    found = Agreement(off, errors[worst], worst, TOLERANCE[s.dtype])
    if s.world == 1:
        return found
    everyone: list[Any] = [None] * s.world
    dist.all_gather_object(everyone, found)
    return max(everyone, key=lambda a: (not a.ok, a.gradient_error, a.loss_error))


def local(tensor: Tensor) -> Tensor:
    """What this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
