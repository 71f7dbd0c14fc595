"""ParallelModule: the model, split. Called, trained and saved like the model itself."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autoshard import caches
from autoshard import parameters as stored_parameters
from autoshard.agreement import InputCheck
from autoshard.caches import Counters, Given, Traced
from autoshard.capture import alone, hollowed
from autoshard.capture import skeleton as make_skeleton
from autoshard.errors import AutoshardError
from autoshard.finite import FiniteWatch
from autoshard.holder import Holder
from autoshard.inputs import normalized_inputs
from autoshard.layers import find
from autoshard.lines import Lines
from autoshard.mesh import Mesh
from autoshard.parameters import Stored
from autoshard.pipeline import Program, analyse, rewrite
from autoshard.plans import Plan
from autoshard.random_streams import begin_traced, end_traced
from autoshard.rank import (
    layered_module,
    layered_sources,
    place_on,
    placeholder_values,
    random_groups,
    rank_module,
    values_of,
)
from autoshard.rearranged import REFERENCE, Rearranged
from autoshard.replay import Subject, verify_ranks
from autoshard.replicas import check_replicas
from autoshard.sharded import Sharded
from autoshard.signatures import (
    Compiled,
    degrees_of,
    example_of,
    key_of,
    outputs_to_keep,
    shapes_of,
)
from autoshard.verification import Report, output_names

KEPT = 4096  # shapes of which it is kept which graph holds for them
LOGITS = ("auto", "whole", "sharded")


class ParallelModule(Holder):
    """A model whose regions run on their shards. Made by ``autoshard.parallelize``.

    Attributes:
        plan: which regions are split, how far, and why.
        graph: the rewritten graph of this rank (the last one that ran).
        mesh: the ``DeviceMesh`` with the dimension ``tp`` (and ``dp``); None in one process.
    """

    plan: Plan

    def __init__(
        self,
        skeleton: nn.Module,
        program: Program,
        plan: Plan,
        sharded: Sharded,
        mesh: Mesh,
        tensors: Mapping[str, Tensor],
        example: tuple[tuple[Any, ...], dict[str, Any]],
        logits: str = "auto",
        check_inputs: bool | str = "first",
        checkpoint: str | None = None,
        pre_norm: bool = False,
    ) -> None:
        stored = {program.captured.parameters[p]: share for p, share in sharded.stored.items()}
        super().__init__(skeleton, tensors, stored, mesh, pre_norm)
        self.__class__ = _with_face_of(type(skeleton), type(self))  # type: ignore[arg-type]
        self.__dict__["_input_check"] = InputCheck(check_inputs, skeleton.forward, mesh)
        self._lines = Lines(mesh)
        self._counters: Counters = set()
        self.plan = plan
        self.logits = logits
        self._checkpoint = checkpoint
        self._compiled: list[Compiled] = []
        self._fits: dict[Any, Compiled] = {}
        self.train(skeleton.training)
        key, _ = key_of(Given(*example), self.training)
        self._last = self._bind(key, program, sharded)
        self._compiled.append(self._last)

    # -- the model's face ----------------------------------------------------------------------

    @property
    def graph(self) -> fx.Graph:
        """The rewritten graph of this rank; parts that are computed again stand in it as one call."""
        return self._last.sharded.runs

    @property
    def mesh(self) -> DeviceMesh | None:
        """The mesh of ranks; None in one process without a process group."""
        mesh: Mesh = self.__dict__["_mesh"]
        return mesh.device_mesh

    @property
    def tp_size(self) -> int:
        """Ranks that share one copy of the model; Accelerate reads it under this name."""
        return self.plan.tp

    def print_readable(self, print_output: bool = True) -> str:
        """The rewritten graph as Python code."""
        return str(self._last.module.print_readable(print_output))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            pass
        value = getattr(self.__dict__.get("_skeleton"), name)
        if callable(value) or isinstance(value, (Tensor, nn.Module)):
            raise AttributeError(
                f"{name!r} of {type(self.__dict__['_skeleton']).__name__} runs on whole weights and is "
                "not available on the parallel module"
            )
        return value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward: the same inputs, the same outputs, the same names.

        A ``transformers.Cache`` among the inputs is changed as the model changes it; in eval mode its
        tensors become DTensors that hold the heads of this rank.
        """
        return self.run(None, args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """A Hugging Face model's own ``generate``; every rank calls it, with the same seed.

        Raises:
            AttributeError: the model has none.
            RanksDifferError: the ranks chose different tokens.
            AutoshardError: an option that the ranks cannot serve.
        """
        from autoshard import generation

        return generation.generate(self, self.__dict__["_skeleton"], *args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where this rank's parameters lie."""
        mesh: Mesh = self.__dict__["_mesh"]
        return mesh.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating parameter, as ``transformers`` says it of a model."""
        found = (p.dtype for p in self.parameters() if p.is_floating_point())
        return next(found, torch.get_default_dtype())

    def agree_on(self, tokens: Tensor) -> None:
        """Raise RanksDifferError on every rank where the ranks of the group have other tokens."""
        self.__dict__["_input_check"].agree_on(tokens)

    def run(self, part: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward; or that of a part of the model alone, which its method ``part`` gives.

        A part is a program of its own, on the parameters as they lie.
        """
        if self._empty:
            raise AutoshardError(
                f"{min(self._empty)} and {len(self._empty) - 1} other parameters have no values: the "
                "model was built on the meta device; call load_weights or init_weights"
            )
        if torch.compiler.is_compiling():
            return self._traced(part, args, kwargs)
        given = caches.opened(args, kwargs, self._counters)
        key, flat = key_of(given, self.training, part)
        known = self._known(key, flat)
        self.__dict__["_input_check"](known, given.args, given.kwargs, self.training)
        compiled = self._find(key, flat, given, known, part)
        if compiled.traced.learnt:  # what counts enters as a size, not as a constant
            self._counters.update(compiled.traced.learnt)
            return self.run(part, args, kwargs)
        inputs = self._entered(flat)
        watch: FiniteWatch | None = self.__dict__.get("_watch")
        if watch is None:
            result = self._run(compiled, inputs)
        else:
            values = placeholder_values(
                compiled.sharded, compiled.captured,
                stored_parameters.local(dict(self.named_parameters())), dict(self.named_buffers()),
                inputs,
            )  # fmt: skip
            results = watch.run(self._flat(compiled), compiled.captured.parameters, values)
            result = self._packed(compiled, results)
        mesh: Mesh = self.__dict__["_mesh"]
        return caches.closed(compiled.traced, given, result, mesh.device) if given.caches else result

    def manual_seed(self, seed: int) -> None:
        """Start dropout's random streams anew; with the same seed on every rank."""
        mesh: Mesh = self.__dict__["_mesh"]
        mesh.manual_seed(seed)

    def random_state(self) -> dict[str, Tensor]:
        """Where dropout's random streams stand: uint8 by <data parallel copy>.<degree>.<coordinate>."""
        mesh: Mesh = self.__dict__["_mesh"]
        return mesh.random_state()

    def load_random_state(self, state: Mapping[str, Tensor]) -> None:
        """Let dropout go on where ``random_state`` was taken, on ranks split in the same way."""
        mesh: Mesh = self.__dict__["_mesh"]
        mesh.load_random_state(state)

    def check_replicas(self, repair: bool = False) -> tuple[str, ...]:
        """Compare what the ranks of a tensor parallel group must hold alike; every rank calls it.

        That is: parameters that are not split, or split in fewer parts than there are ranks; buffers;
        the random streams of dropout. Bit for bit. Data parallel copies are not compared: keeping
        these the same is the work of what sums their gradients.

        Costs one pass over this rank's memory and 16 bytes of communication for each tensor.

        Args:
            repair: give every rank the values of the first that holds them, in place of raising.

        Returns:
            One line for each thing that was repaired; nothing where all was the same.

        Raises:
            RanksDifferError: on every rank of the group, with each thing that differs, the ranks, and
                the largest absolute difference.
        """
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        stored = {name: self.share_of(name) for name in tensors}
        return check_replicas(tensors, stored, self.__dict__["_mesh"], repair)

    @contextlib.contextmanager
    def check_finite(self) -> Iterator[None]:
        """Inside, say where an infinity or a NaN first appears, forward or backward.

        The graph runs node by node and every value is looked at: slow, and meant for the step that
        went wrong. All ranks of a tensor parallel group enter and leave it together.

            with tp_model.check_finite():
                tp_model(**batch).loss.backward()

        Raises:
            NonFiniteError: on every rank of the group, after the forward or, for gradients, at the next
                forward or the end of the block: the value, its layer and region, and the ranks.
            AutoshardError: after ``autoshard.fully_shard``: layers are not called here, and their
                parameters are whole in their calls only.
        """
        if any(isinstance(layer, FSDPModule) for layer in self.modules() if layer is not self):
            raise AutoshardError(
                "check_finite runs the graph without calling its layers, and fully_shard has split "
                "their parameters further: use it on whole copies, before autoshard.fully_shard"
            )
        watch = FiniteWatch(self.plan, self.__dict__["_mesh"])
        self.__dict__["_watch"] = watch
        try:
            yield
            watch.end()
        finally:
            watch.close()
            del self.__dict__["_watch"]

    def verify(self, batch: Any, device: torch.device | str | None = None) -> Report:
        """Compare a step on these ranks with the model itself, whole, on one rank of each group.

        With ``pre_norm=True`` the rearranged model takes the model's place, run whole from its graph.

        The first rank of a tensor parallel group gathers the parameters into a copy of the model and
        runs it: outputs, loss, and the gradient of every parameter are compared, in the precision that
        the parameters have, with dropout off. Every rank calls it, with the same batch; before
        ``fully_shard`` or ``DistributedDataParallel``. Parameters, gradients, buffers, random streams
        and the mode are as before.

        Args:
            batch: tuple or dict of the forward's arguments, as for a call.
            device: where the whole model runs, with its gradients; this rank's device if not given.

        Returns:
            The report that ``autoshard.verify`` gives too, the same on every rank of the group.

        Raises:
            RanksDifferError: the ranks of a group got different batches.
            AutoshardError: the whole model does not run on that device.
        """
        args, kwargs = normalized_inputs(self.__dict__["_skeleton"], batch)
        mesh: Mesh = self.__dict__["_mesh"]
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(mesh.device), (args, kwargs))
        self.__dict__["_input_check"].compare(args, kwargs, self.training)
        where = torch.device(device or mesh.device)
        model = make_skeleton(self.__dict__["_skeleton"]).train(self.training)
        last = self._last
        try:
            given = caches.opened(args, kwargs, self._counters)
            # What has to be captured is captured as for a step.
            key, flat = key_of(given, self.training)
            compiled = self._find(key, flat, given, self._known(key, flat))
            if self._pre_norm:
                model = Rearranged(model, compiled.program, where)
            subject = Subject(
                self.forward, model, lambda count: output_names(self._last.program, count),
                dict(self.named_parameters()), dict(self.named_buffers()), self.share_of, mesh,
                self.plan,
            )  # fmt: skip
            report = verify_ranks(subject, args, kwargs, where)
            return replace(report, reference=REFERENCE) if self._pre_norm else report
        finally:
            self.__dict__["_last"] = last

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModule:
        """Parameters and buffers of its own; the compiled graphs and the mesh are shared."""
        copied: ParallelModule = type(self).__new__(type(self))
        memo[id(self)] = copied
        shared: dict[str, Any] = {
            "_lines": self._lines,
            "_skeleton": make_skeleton(self.__dict__["_skeleton"]),
            "_mesh": self.__dict__["_mesh"],
            "_compiled": list(self._compiled),
            "_fits": dict(self._fits),
            "_last": self._last,
            "plan": self.plan,
        }
        for name, value in self.__dict__.items():
            copied.__dict__[name] = shared[name] if name in shared else copy.deepcopy(value, memo)
        return copied

    # -- inside --------------------------------------------------------------------------------

    def _run(self, compiled: Compiled, flat: list[Any]) -> Any:
        """The graph on the parameters as they are now, layer by layer."""
        names = {s.name: find(self, s.name) for s in compiled.sources if s.kind == "parameter"}
        parameters = stored_parameters.local(names)
        held = functools.partial(find, self)
        values = values_of(compiled.sources, compiled.captured, parameters, held, flat)
        return self._packed(compiled, compiled.module(*values))

    def _entered(self, flat: list[Any]) -> list[Any]:
        """The flat inputs, of DTensors this rank's shares."""
        return [self._lines.enter(x) if isinstance(x, DTensor) else x for x in flat]

    def _packed(self, compiled: Compiled, results: Iterable[Any]) -> Any:
        """The model's outputs from the graph's flat ones."""
        outputs = [
            result if split is None else self._lines.leave(self._kept(result), split)
            for result, split in zip(results, compiled.sharded.outputs, strict=True)
        ]
        return pytree.tree_unflatten(outputs, compiled.captured.out_spec)

    def _kept(self, share: Tensor) -> Tensor:
        """A share that leaves beside a loss. A compiled graph has to give every output a gradient, and
        PyTorch (2.11 to 2.13, issue 172556) fails where that of a DTensor is missing, as it is here
        in ordinary training."""
        if self.logits == "sharded" or not torch.compiler.is_compiling() or not share.requires_grad:
            return share
        _say_detached()
        return share.detach()

    def _traced(self, part: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward within torch.compile: the graph that was captured for such inputs."""
        key, flat = key_of(Given(args, kwargs), self.training, part)
        for compiled in self._compiled:
            if compiled.key == key and compiled.captured.holds(flat):
                begun = begin_traced(compiled.streams, self.__dict__["_mesh"].device)
                result = self._run(compiled, self._entered(flat))
                end_traced(begun)
                return result
        return self._not_traced(part, args, kwargs)

    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="there is no graph for such inputs yet: call the model with them once, not compiled, or "
        "pass them as example_inputs= to parallelize"
    )
    def _not_traced(self, *given: Any) -> Any:
        return self.run(*given)

    def _known(self, key: Any, flat: list[Any]) -> Compiled | None:
        """The graph that holds for these inputs; None where it has still to be captured."""
        place = key, shapes_of(flat)
        known = self._fits.get(place)
        if known is None:
            fitting = (c for c in self._compiled if c.key == key and c.captured.holds(flat))
            known = next(fitting, None)
            if known is not None:
                if len(self._fits) >= KEPT:
                    self._fits.clear()
                self._fits[place] = known
        return known

    def _find(
        self, key: Any, flat: list[Any], given: Given, known: Compiled | None, part: str | None = None
    ) -> Compiled:
        if known is None:
            known = self._capture(key, given, part)
            self._compiled.append(known)
            self._fits[key, shapes_of(flat)] = known
        self.__dict__["_last"] = known
        return known

    def _capture(self, key: Any, given: Given, part: str | None = None) -> Compiled:
        """Capture again for another signature; the parameters stay as they lie."""
        skeleton: nn.Module = self.__dict__["_skeleton"]
        skeleton.train(self.training)
        flat = pytree.tree_leaves((given.args, given.kwargs))
        held = {i: self._lines.stored(x) for i, x in enumerate(flat) if isinstance(x, DTensor)}
        shares = {i: share for i, share in held.items() if share is not None}
        args, kwargs = pytree.tree_map_only(Tensor, example_of, (given.args, given.kwargs))
        with alone(skeleton, part), caches.traced(skeleton, given, self._counters) as found:
            program = analyse(
                skeleton, args, kwargs, self.plan.tp, pre_norm=self._pre_norm, held=shares
            )
        keep = outputs_to_keep(program, self.training, self.logits, found)
        degrees = degrees_of(self.plan, program)
        again = self.training and self._checkpoint == "layer"
        _, sharded = rewrite(
            program, self.plan.tp, degrees, keep, layers_again=again, overlap=self.plan.overlap
        )
        lying = {program.captured.parameters[p]: s for p, s in sharded.stored.items()}
        used = {program.captured.parameters[n.name] for n in program.analysis.axes.parameters}
        for name in used:
            if lying.get(name) != self._stored.get(name):
                raise AutoshardError(
                    f"{name} is stored {_in_words(self._stored.get(name))}, but these inputs need it "
                    f"{_in_words(lying.get(name))}: pass inputs like them as example_inputs= to "
                    "parallelize, or give its region degree 1"
                )
        return self._bind(key, program, sharded, found)

    def _bind(
        self, key: Any, program: Program, sharded: Sharded, found: Traced | None = None
    ) -> Compiled:
        mesh: Mesh = self.__dict__["_mesh"]
        place_on(sharded, mesh.device)
        program.captured.constants.update(
            {n: t.to(mesh.device) for n, t in program.captured.constants.items()}
        )
        return Compiled(
            key, program, sharded,
            layered_module(sharded, mesh.group), layered_sources(sharded, program.captured),
            tuple(mesh.group(degree).stream for degree in random_groups(sharded)),
            found or Traced(),
        )  # fmt: skip

    def _flat(self, compiled: Compiled) -> fx.GraphModule:
        """The graph with no layers and nothing computed again: every value, each once."""
        mesh: Mesh = self.__dict__["_mesh"]
        return rank_module(compiled.sharded, mesh.group, flat=True)

    def _apply(self, fn: Any, recurse: bool = True) -> ParallelModule:
        before = {n: p.dtype for n, p in self.named_parameters()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = {n: p.dtype for n, p in self.named_parameters()}
        if before != after:  # dtypes stand in the graph
            skeleton: nn.Module = self.__dict__["_skeleton"]
            tensors = dict(self.state_dict_tensors())
            for name, hollow in (*skeleton.named_parameters(), *skeleton.named_buffers()):
                if name in tensors and hollow.dtype != tensors[name].dtype:
                    hollow.data = hollowed(hollow, tensors[name].dtype)
            self._compiled.clear()
            self._fits.clear()
        return self


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _say_detached() -> bool:
    """Once for each compilation."""
    warnings.warn(
        "within torch.compile the logits beside a loss carry no gradient; if they are part of what you "
        "train on, pass logits='sharded' to parallelize",
        stacklevel=2,
    )
    return True


@functools.cache
def _with_face_of(model: type[nn.Module], base: type[ParallelModule]) -> type[ParallelModule]:
    """The class with the name and the forward's signature of the model's: training loops read both."""

    def forward(self: ParallelModule, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    forward.__doc__ = base.forward.__doc__
    return type(model.__name__, (base,), {"forward": forward, "__doc__": base.__doc__})


def _in_words(stored: Stored | None) -> str:
    return "whole" if stored is None else f"split as {stored[1]} in dimension {stored[0]}"
