"""The door: ``parallelize`` and ``plan``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autoshard.agreement import MODES
from autoshard.capture import skeleton
from autoshard.cost_model.hardware import Hardware
from autoshard.errors import AutoshardError, PlanError, UnknownOperatorError
from autoshard.groups import Room
from autoshard.inputs import Inputs, normalized_inputs
from autoshard.mesh import Mesh, init_mesh
from autoshard.module import LOGITS, ParallelModule
from autoshard.parameters import agree
from autoshard.passes.assign_degrees import Request, fingerprint
from autoshard.pipeline import Program, analyse, rewrite
from autoshard.planning import Costs, Target, planned, setting_of
from autoshard.plans import Plan
from autoshard.signatures import outputs_to_keep, plan_hash


def parallelize(
    model: nn.Module,
    tp: int,
    example_inputs: Any = None,
    *,
    degree: str | int = "auto",
    plan: Plan | str | Path | None = None,
    hardware: str | Path | Hardware | None = None,
    batch: int | None = None,
    sequence: int | None = None,
    memory: float | None = None,
    optimizer: str = "adamw",
    uniform: bool = False,
    mesh: DeviceMesh | None = None,
    device: torch.device | str | None = None,
    logits: str = "auto",
    strict: bool = False,
    checkpoint: str | None = None,
    check_inputs: bool | str = "first",
    pre_norm: bool = False,
) -> ParallelModule:
    """Split a model over ``tp`` ranks inside its layers; called on every rank.

    Args:
        model: any transformer written for one GPU, on any device, with its weights. All ranks get
            the first rank's weights. Parameters on the meta device get room on the ranks, to be filled
            by ``load_weights`` or ``init_weights``.
        tp: number of ranks to split over. The world may be a multiple: the rest is data parallel.
        example_inputs: tuple or dict of ``forward``'s arguments; found when not given.
        degree: ``"auto"``: the cost model chooses the degree of each region, of least predicted step
            time that fits in memory; ``"max"``: the largest that each region's axes take; a number:
            the largest that also divides it.
        plan: a ``Plan``, or the path of a saved one, instead of ``degree``.
        hardware: what to plan for: ``v100``, ``a100``, ``h100``, ``h200``, ``cpu``, or the path of a
            profile that ``autoshard calibrate`` wrote; the GPU at hand where not given, else h100.
        batch, sequence: of one step; where not given those of ``example_inputs``, else 8 and the
            model's longest sequence.
        memory: bytes that a rank may use; the device's where not given.
        optimizer: whose state counts as memory: ``adamw``, ``adamw-mixed``, ``momentum``, ``sgd``,
            ``adafactor``, ``none``.
        uniform: ``"auto"`` takes the degrees 1 and ``tp`` only.
        mesh: a ``DeviceMesh`` with the dimension ``tp`` (and ``dp``); made when not given, with the
            default process group from torchrun's environment where there is none.
        device: where the parameters go; the GPU of this rank, or the CPU without one.
        logits: ``"auto"``: in train mode beside a loss, outputs that are split stay so, as DTensors;
            whole else. ``"whole"`` and ``"sharded"`` say so for all.
        strict: an operator without a rule is an error instead of a line in the plan.
        check_inputs: compare the inputs of a call among the ranks of each tensor parallel group, and
            raise on all of them where they differ: ``True``: every call; ``"first"``: the first three
            of every captured graph; ``False``: none. A call that is compared waits for the device once.
        checkpoint: ``"layer"``: in train mode the activations of every numbered layer are computed
            again in the backward pass; no collective of the forward is repeated, and dropout draws the
            same. None: only of what the model itself runs under ``torch.utils.checkpoint``.
        pre_norm: another function, on purpose: the norms of a model that has them after its residual
            additions (BERT) are moved to before its sublayers, so that it trains when it is deep.
            Every parameter keeps its name; ``autoshard.passes.rearrange_norms`` says what each norm
            normalises then.

    Returns:
        A module with the model's inputs, outputs, and parameter names.

    Raises:
        ValueError: ``tp`` does not fit the world; a malformed argument.
        CaptureError: the model cannot be captured as one graph.
        PlanError: no region can be split; a plan that does not fit the model; ranks that disagree.
        UnknownOperatorError: with ``strict``.
        AutoshardError: with ``pre_norm``: the norms of some layers do not follow residual additions.
    """
    _check_model(model, tp)
    if check_inputs not in MODES:
        raise ValueError(f'check_inputs={check_inputs!r} must be True, False or "first"')
    if logits not in LOGITS:
        raise ValueError(f"logits={logits!r} must be one of {', '.join(LOGITS)}")
    device_mesh = init_mesh(tp, mesh, device)
    target = Target(hardware, batch, sequence, memory, optimizer, checkpoint, uniform)
    given = _read(plan)
    program, request, example = _analysed(model, tp, example_inputs, degree, given, pre_norm)
    costs = _costs(program, model, tp, target, example, example_inputs)
    unknown = [n for n, b in model.named_buffers() if b.is_meta]
    if unknown:
        raise AutoshardError(
            f"the buffer {unknown[0]} and {len(unknown) - 1} others are on the meta device, and their "
            "values may be in no file: build the model under autoshard.meta_parameters() in place of "
            'torch.device("meta")'
        )
    keep = outputs_to_keep(program, model.training, logits)
    again = model.training and checkpoint == "layer"
    made, sharded = rewrite(program, tp, request, keep, costs, uniform, again, _overlap(given))
    if again and sharded.nested is None:
        raise AutoshardError(
            'checkpoint="layer" finds no numbered layers (h.0, layers.0, ...) of several operators '
            "in this model: put its layers in an nn.ModuleList, or call torch.utils.checkpoint in it"
        )
    _check_plan(made, tp, strict)
    _check_ranks(plan_hash(made, sharded), device_mesh)
    rooms = _rooms(made, costs, model, device_mesh)
    ranks = Mesh(device_mesh, tuple(made.degrees.values()), device=device, rooms=rooms)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    agree({n: t for n, t in tensors.items() if not t.is_meta}, ranks)
    return ParallelModule(
        skeleton(model),
        program,
        made,
        sharded,
        ranks,
        tensors,
        example,
        logits,
        check_inputs,
        checkpoint,
        pre_norm,
    )


def plan(
    model: nn.Module,
    tp: int,
    example_inputs: Any = None,
    *,
    degree: str | int = "auto",
    plan: Plan | str | Path | None = None,
    hardware: str | Path | Hardware | None = None,
    batch: int | None = None,
    sequence: int | None = None,
    memory: float | None = None,
    optimizer: str = "adamw",
    checkpoint: str | None = None,
    uniform: bool = False,
    mesh: DeviceMesh | None = None,
    device: torch.device | str | None = None,
    logits: str = "auto",
    strict: bool = False,
    check_inputs: bool | str = "first",
    pre_norm: bool = False,
) -> Plan:
    """The plan that ``parallelize`` would follow. No process group, no GPU; meta models too.

    Args: as ``parallelize``, so that one set serves both; ``mesh``, ``device``, ``logits`` and
        ``check_inputs`` change nothing here.
        checkpoint: ``"layer"``: plan for activations that are computed again, layer by layer.

    Raises: as ``parallelize``.
    """
    _check_model(model, tp)
    target = Target(hardware, batch, sequence, memory, optimizer, checkpoint, uniform)
    given = _read(plan)
    program, request, example = _analysed(model, tp, example_inputs, degree, given, pre_norm)
    costs = _costs(program, model, tp, target, example, example_inputs)
    made, _ = planned(program.analysis, tp, request, costs, uniform, _overlap(given))
    _check_plan(made, tp, strict)
    return made


def _analysed(
    model: nn.Module,
    tp: int,
    example_inputs: Any,
    degree: str | int,
    given: Plan | None,
    pre_norm: bool,
) -> tuple[Program, Request, Inputs]:
    request = _request(model, tp, degree, given)
    args, kwargs = normalized_inputs(model, example_inputs)
    program = analyse(skeleton(model), args, kwargs, tp, None, pre_norm)
    return program, request, (args, kwargs)


def _costs(
    program: Program, model: nn.Module, tp: int, target: Target, example: Inputs, given: Any
) -> Costs:
    setting = setting_of(target, model, example, given is not None)
    return Costs(program.analysis, tp, setting, target)


def _rooms(
    plan: Plan, costs: Costs, model: nn.Module, mesh: DeviceMesh | None
) -> dict[int, tuple[Room, ...]]:
    """What products leave to sums, by degree: where the plan lets sums run under products, and the GPU
    at hand is of the size planned for. Nothing where ranks differ: a sum is on one communicator."""
    if mesh is None:
        return {}
    hardware = costs.setting.hardware
    found: dict[int, tuple[Room, ...]] = {}
    if plan.overlap and hardware.lanes and torch.cuda.is_available():
        if torch.cuda.get_device_properties().multi_processor_count == hardware.multiprocessors:
            largest = max(model.parameters(), key=lambda p: p.numel())
            found = costs.rooms(str(largest.dtype).removeprefix("torch."))
    known = _of_all_ranks(hashlib.sha256(repr(found).encode()).hexdigest(), mesh)
    return found if bool((known[:, 1:] == known[0, 1:]).all()) else {}


def _request(model: nn.Module, tp: int, degree: str | int, plan: Plan | None) -> Request:
    if plan is None:
        if degree in ("auto", "max"):
            return degree
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1 or tp % degree:
            raise ValueError(f'degree={degree!r} must be "auto", "max" or a divisor of tp={tp}')
        return degree
    if plan.tp != tp:
        raise PlanError(f"the plan is for tp={plan.tp}, not tp={tp}: make one with plan(model, {tp})")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if plan.fingerprint and plan.fingerprint != fingerprint(shapes):
        raise PlanError(
            f"the plan was made for another model (fingerprint {plan.fingerprint}, this model has "
            f"{fingerprint(shapes)}): parameter names or shapes differ; make a new one with plan()"
        )
    return plan.degrees


def _read(given: Plan | str | Path | None) -> Plan | None:
    return given if given is None or isinstance(given, Plan) else Plan.load(given)


def _overlap(plan: Plan | None) -> bool:
    """What a given plan says of it; without one all-reduces run under matmuls wherever they can."""
    return plan is None or plan.overlap


def _check_model(model: nn.Module, tp: int) -> None:
    if isinstance(tp, bool) or not isinstance(tp, int) or tp < 1:
        raise ValueError(f"tp={tp!r} must be a positive number of ranks")
    if isinstance(model, ParallelModule):
        raise AutoshardError(
            f"this model is already split over {model.plan.tp} ranks; pass the plain model"
        )
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, is {type(model).__name__}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise AutoshardError(f"{name} is a DTensor already: pass the plain model")
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise AutoshardError(
                f"{name} has a hook on its gradient, which would be lost: register it on the parallel "
                "module's parameter of the same name, after parallelize"
            )


def _check_plan(made: Plan, tp: int, strict: bool) -> None:
    if strict and made.unknown:
        raise UnknownOperatorError(
            f"{len(made.unknown)} operators without a rule keep their operands whole: "
            + "; ".join(made.unknown[:8])
        )
    if tp > 1 and not any(len(region.degrees) > 1 for region in made.regions):
        sizes = [f"{r.name or r.kind}: its axis {r.axes[0]}" for r in made.regions[:3]]
        whole = [f"{w.name}: {w.reason}" for w in made.replicated[:3]]
        reasons = "; ".join(sizes or whole)
        raise PlanError(
            f"no region of this model can be split over tp={tp} ranks ({reasons or 'no matmuls'})"
        )


def _check_ranks(digest_of_plan: str, mesh: DeviceMesh | None) -> None:
    """All ranks must have computed the same plan, before any weight is touched."""
    if mesh is None:
        return
    known = _of_all_ranks(digest_of_plan, mesh)
    first = known[0]
    others = [str(int(row[0])) for row in known if not torch.equal(row[1:], first[1:])]
    if others:
        raise PlanError(
            f"rank(s) {', '.join(others)} computed another plan than rank {int(first[0])}: build the "
            "same model, with the same arguments, on every rank"
        )


def _of_all_ranks(digest: str, mesh: DeviceMesh) -> Tensor:
    """A row for each rank in the mesh, by rank: its number, and the bytes of its hexadecimal digest."""
    own = torch.tensor([dist.get_rank(), *bytes.fromhex(digest)], dtype=torch.int64)
    known = own.to(mesh.device_type)[None]
    for dim in reversed(range(mesh.ndim)):  # after the last dimension, every rank knows all
        group = mesh.get_group(dim)
        parts: list[Tensor] = [torch.empty_like(known) for _ in range(group.size())]
        dist.all_gather(parts, known.contiguous(), group=group)
        known = torch.cat(parts)
    return known[known[:, 0].argsort()].cpu()
