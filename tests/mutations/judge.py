"""The judge: does a rewritten graph, on real gloo ranks, compute what the plain model computes?

It shares nothing with the two checkers that it is asked about, neither the proof nor ``verify``: how
parameters are perturbed, which tokens are used, what is differentiated and how results are compared is
written here again, in other words. Each rank holds its own shares, runs the graph, and compares its
outputs, and its share of every gradient, with those of the plain model, which it runs itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autoshard import layouts, ops, shares
from autoshard.autograd_functions import is_kept, packed, unpack
from autoshard.capture import Captured
from autoshard.groups import Group, ProcessGroupComm, ReduceOp, SingleGroup
from autoshard.random_streams import RandomStream
from autoshard.sharded import Sharded
from tests.mutations.subjects import Spec, Subject, exact, example, spec_of

EQUAL = 1e-9
PATIENCE = 120.0  # seconds for one mutant
SAME, CHANGED, RAISED = "equivalent", "changes the function", "raises"
DONE, STOPPED, COLLECTIVE = 0, 1, 2


@dataclass(frozen=True)
class Reference:
    """In a written graph, the node of this name."""

    name: str


@dataclass(frozen=True)
class Operator:
    """In a written graph, ``torch.ops`` and what follows."""

    name: str


@dataclass(frozen=True)
class Written:
    """A rewritten graph, and what its placeholders are, as it is sent to the ranks."""

    nodes: list[tuple[str, str, Any, Any, Any]]
    stored: dict[str, tuple[int, layouts.Layout, int]]
    inputs: list[str]
    parameters: dict[str, str]
    buffers: dict[str, str]
    constants: dict[str, Tensor]
    functions: list[Any]

    def graph(self) -> fx.Graph:
        """The graph again."""
        for function in self.functions:  # of the model's own, which the capture made operators
            unpack(function)
        graph = fx.Graph()
        made: dict[str, fx.Node] = {}

        def read(x: Any) -> Any:
            if isinstance(x, Reference):
                return made[x.name]
            if isinstance(x, Operator):
                found: Any = torch.ops
                for part in x.name.split("."):
                    found = getattr(found, part)
                return found
            return x

        for name, op, target, args, kwargs in self.nodes:
            args, kwargs = (fx.node.map_aggregate(a, read) for a in (args, kwargs))
            made[name] = graph.create_node(op, read(target), args, kwargs, name)
        return graph


def written(sharded: Sharded, captured: Captured) -> Written:
    """The graph without what the capture knew of its values."""

    def write(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return Reference(x.name)
        return Operator(str(x)) if isinstance(x, torch._ops.OpOverload) else x

    nodes = []
    for n in sharded.graph.nodes:
        args, kwargs = (fx.node.map_aggregate(a, write) for a in (n.args, n.kwargs))
        nodes.append((n.name, n.op, write(n.target), args, kwargs))
    return Written(
        nodes, dict(sharded.stored), list(captured.inputs), dict(captured.parameters),
        dict(captured.buffers), dict(captured.constants),
        [packed(n.target) for n in sharded.graph.nodes if is_kept(n.target)],
    )  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant on real ranks: one of the three, and the error or what was raised."""

    outcome: str
    error: float = 0.0
    said: str = ""


# -- on a rank ------------------------------------------------------------------------------------


class Disagreement(RuntimeError):
    """Another rank of the world stopped, or brings another tensor to this collective."""


def _meet(code: int, mark: int = 0) -> list[tuple[int, int]]:
    """What every rank of the world is about to do. No rank waits for one that has stopped."""
    mine = torch.tensor([code, mark])
    everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, mine)
    return [(int(x[0]), int(x[1])) for x in everybody]


class Checked(ProcessGroupComm):
    """A gloo group whose ranks agree on the tensor before each collective."""

    def _agree(self, name: str, x: Tensor) -> None:
        mark = zlib.crc32(repr((name, self.degree, tuple(x.shape), x.dtype)).encode())
        found = _meet(COLLECTIVE, mark)
        if any(code != COLLECTIVE for code, _ in found):
            raise Disagreement(f"a rank does not come to this {name}")
        if len({found[r][1] for r in self.ranks}) > 1:
            raise Disagreement(f"{name} of other shapes, here {tuple(x.shape)}")

    def all_reduce(self, x: Tensor, op: ReduceOp = "sum", *, inplace: bool = False) -> Tensor:
        """One all-reduce."""
        self._agree(op, x)
        return super().all_reduce(x, op, inplace=inplace)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """One all-gather."""
        self._agree("all-gather", x)
        return super().all_gather(x)


@cache
def _members(degree: int) -> Any:
    """This rank's process group of neighbours: 0 1 | 2 3 for degree 2."""
    world = dist.get_world_size()
    groups = [list(range(i, i + degree)) for i in range(0, world, degree)]
    made = [dist.new_group(g) for g in groups]
    return made[dist.get_rank() // degree]


def _group(degree: int) -> Group:
    """A group with a stream of its own for each coordinate."""
    if degree == 1:
        return SingleGroup(RandomStream(1))
    if dist.get_world_size() % degree:
        raise ValueError(f"{dist.get_world_size()} ranks have no groups of {degree}")
    coordinate = dist.get_rank() % degree
    return Checked(_members(degree), RandomStream(100 * degree + coordinate))


class _Double(TorchDispatchMode):
    """Eager code that asks for float32 gets float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(
            torch.dtype, lambda d: torch.float64 if d is torch.float32 else d, (args, kwargs or {})
        )
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Plain:
    """The model with other parameters, its inputs, and what it computes."""

    model: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[Any]
    gradients: dict[int, Tensor]


@cache
def plain(name: str) -> Plain:
    """The model as it is, on one process."""
    spec = spec_of(name)
    model = spec.build(spec.attention, dropout=0.0, seed=1).double().eval()
    if hasattr(model, "config") and hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")  # the others' kernels know no float64
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    inputs = boundary(spec)
    with _Double():
        outputs = pytree.tree_leaves(model(**{k: v.clone() for k, v in inputs.items()}))
        _differentiate(outputs)
    gradients = {id(p): torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()}
    return Plain(model, inputs, [_detached(x) for x in outputs], gradients)


def boundary(spec: Spec) -> dict[str, Tensor]:
    """The first token, the last, and those on both sides of every border between shards."""
    edges = {0, spec.vocabulary - 1}
    for ranks in (2, 4):
        size = -(-spec.vocabulary // ranks)
        edges |= {e for r in range(1, ranks) for e in (r * size - 1, r * size)}
    found = {}
    for place, (key, value) in enumerate(example(spec).items()):
        generator = torch.Generator().manual_seed(3 + place)
        tokens = torch.randint(spec.vocabulary, (value.numel(),), generator=generator)
        ids = sorted(edges)[: value.numel() - 3]
        tokens[: len(ids)] = torch.tensor(ids)
        tokens = tokens[torch.randperm(value.numel(), generator=generator)].view(value.shape).clone()
        if key == spec.labels:
            spare = [i for i, t in enumerate(tokens.flatten().tolist()) if t not in edges]
            tokens.view(-1)[spare[:2]] = spec.ignored
        found[key] = tokens
    return found


def _differentiate(outputs: list[Any]) -> None:
    """Backward of all outputs, each element with a weight of its own."""
    generator = torch.Generator().manual_seed(5)
    terms = []
    for x in outputs:
        if isinstance(x, Tensor) and x.requires_grad:
            terms.append((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum())
    if terms:
        torch.stack(terms).sum().backward()


def _detached(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _garbage(x: Tensor, dim: int, size: int) -> Tensor:
    """Padding in which anything may stand."""
    dim %= x.dim()
    missing = size - x.shape[dim]
    if missing <= 0:
        return shares.pad_to(x, dim, size)
    rows = torch.linspace(-9, 7, missing * (x.numel() // max(1, x.shape[dim])), dtype=x.dtype)
    return torch.cat([x, rows.view(*x.shape[:dim], missing, *x.shape[dim + 1 :])], dim)


def _bound(sent: Written, group: Callable[[int], Group]) -> fx.GraphModule:
    graph = sent.graph()
    for node in graph.nodes:
        if node.target is shares.pad_to:
            node.target = _garbage
    named = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    return fx.GraphModule({name: group(int(name[2:])) for name in sorted(named)}, graph)


def _values(
    sent: Written, model: nn.Module, inputs: dict[str, Tensor], group: Callable[[int], Group]
) -> tuple[list[Any], dict[int, tuple[Tensor, Any]]]:
    """The graph's placeholders; and each parameter's own share, with the indices that it has."""
    given = dict(zip(sent.inputs, pytree.tree_leaves(((), inputs)), strict=True))
    own: dict[int, tuple[Tensor, Any]] = {}
    values = []
    for _, op, name, _, _ in sent.nodes:
        if op != "placeholder":
            break
        if name in sent.parameters:
            whole = model.get_parameter(sent.parameters[name])
            if id(whole) not in own:
                held: Any = None
                value = whole.detach()
                if name in sent.stored:
                    dim, layout, degree = sent.stored[name]
                    held = dim, torch.tensor(layouts.indices(layout, group(degree).coordinate)).long()
                    everywhere = {i for r in range(degree) for i in layouts.indices(layout, r)}
                    if len(everywhere) != whole.shape[dim]:
                        raise ValueError(f"{name}: {len(everywhere)} of {whole.shape[dim]} are stored")
                    value = value.index_select(*held)
                own[id(whole)] = value.clone().requires_grad_(whole.requires_grad), held
            values.append(own[id(whole)][0])
        elif name in sent.buffers:
            values.append(model.get_buffer(sent.buffers[name]).clone())
        else:
            found = sent.constants.get(name, given.get(name))
            values.append(found.clone() if isinstance(found, Tensor) else found)
    return values, own


def compared(name: str, sent: Written) -> float:
    """The largest relative error of this rank's outputs and shares of gradients."""
    right = plain(name)
    group = cache(_group)
    values, own = _values(sent, right.model, right.inputs, group)
    outputs = list(_bound(sent, group).forward(*values))  # a call would print what is raised
    _differentiate(outputs)
    errors = [_error(x, y, 0.0) for x, y in zip(outputs, right.outputs, strict=True)]
    largest = max(float(g.abs().max()) for g in right.gradients.values())
    for key, gradient in right.gradients.items():
        if key not in own:
            errors.append(_error(torch.zeros_like(gradient), gradient, largest))
            continue
        leaf, held = own[key]
        mine = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        errors.append(_error(mine, gradient if held is None else gradient.index_select(*held), largest))
    return max(errors)


def _error(x: Any, y: Any, largest: float) -> float:
    """Of x, which should be y; what is nearly zero is measured by the largest of its kind."""
    if not isinstance(y, Tensor):
        return 0.0 if x == y else float("inf")
    if not isinstance(x, Tensor) or x.shape != y.shape:
        return float("inf")
    if not y.is_floating_point():
        return 0.0 if torch.equal(x, y) else float("inf")
    if not y.numel():
        return 0.0
    off = float((x.detach() - y).abs().max())
    scale = max(float(y.abs().max()), 1e-4 * largest)
    error = off / scale if scale else off
    return error if error == error else float("inf")


class Masks(fx.Interpreter):
    """Runs a graph, and keeps what each dropout was given and what it kept."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: list[tuple[str, str]] = []

    def run_node(self, n: fx.Node) -> Any:
        """One node's value. The mask is what the operator does to ones, from the same random state."""
        args: Any
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target is ops.with_stream:
            stream, place = args[0].stream, 2
            before = stream.state_dict()
            mask = ops.with_stream(
                *args[:place], torch.ones_like(args[place]), *args[place + 1 :], **kwargs
            )
            stream.load_state_dict(before)
        elif n.target is torch.ops.aten.dropout.default:
            place, state = 0, torch.get_rng_state()
            mask = n.target(torch.ones_like(args[0]), *args[1:], **kwargs)
            torch.set_rng_state(state)
        else:
            return super().run_node(n)
        self.found.append((_digest(args[place]), _digest(mask)))
        return super().run_node(n)


def _digest(x: Tensor) -> str:
    return hashlib.blake2b(x.detach().contiguous().numpy().tobytes(), digest_size=8).hexdigest()


@cache
def _dropping(name: str) -> nn.Module:
    spec = spec_of(name)
    return spec.build("eager", dropout=0.2, seed=1).train()


def masks(name: str, sent: Written) -> tuple[list[tuple[str, str]], bool]:
    """Digests of each dropout's operand and mask; whether torch's own generator was drawn from."""
    group = cache(_group)
    torch.manual_seed(dist.get_rank())
    before = torch.get_rng_state()
    with torch.no_grad():
        values, _ = _values(sent, _dropping(name), example(spec_of(name)), group)
        run = Masks(_bound(sent, group))
        run.run(*values, enable_io_processing=False)
    return run.found, not torch.equal(before, torch.get_rng_state())


def _serve(connection: Connection, rank: int, world: int, folder: str) -> None:
    """A rank: judges the mutants that it is sent, one after the other, until told to stop."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for degree in (d for d in range(2, world + 1) if world % d == 0):
        _members(degree)  # all ranks make them together
    while (told := connection.recv()) is not None:
        function, name, sent = told
        answer: tuple[str, Any]
        try:
            with exact() if function else contextlib.nullcontext():
                answer = "done", (compared if function else masks)(name, sent)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            answer = "raised", f"{type(error).__name__}: {error} ({frame.name})"[:300]
        code = DONE if answer[0] == "done" else STOPPED
        while any(c == COLLECTIVE for c, _ in _meet(code)):
            pass
        connection.send(answer)


# -- in the test's process ------------------------------------------------------------------------


class Judge:
    """A world of gloo ranks that lives as long as the block; started again if a mutant kills it."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.processes: list[Any] = []
        self.connections: list[Connection] = []

    def __enter__(self) -> Judge:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process in self.processes:
            process.join(2.0)
        self._stop()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(self.world):
            mine, its = context.Pipe()
            arguments = (its, rank, self.world, str(Path(self.folder.name)))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            its.close()
            self.processes.append(process)
            self.connections.append(mine)

    def _stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for connection in self.connections:
            connection.close()
        self.processes, self.connections = [], []
        self.folder.cleanup()

    def judged(self, subject: Subject, mutants: Iterable[Sharded]) -> Iterator[Verdict]:
        """The verdict on each mutant. The ranks work on the next two while the caller has one."""
        waiting: deque[Any] = deque()
        for mutant in mutants:
            waiting.append(
                (subject.exact, subject.spec.name, written(mutant, subject.program.captured))
            )
            self._send(waiting[-1])
            if len(waiting) > 2:
                yield self._verdict(waiting)
        while waiting:
            yield self._verdict(waiting)

    def _verdict(self, waiting: deque[Any]) -> Verdict:
        function, *_ = waiting.popleft()
        found = self._receive()
        if found is None:
            self._stop()
            self._start()
            for sent in waiting:
                self._send(sent)
        return _verdict(found) if function else _verdict_on_masks(found)

    def _send(self, sent: Any) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):  # a dead rank: known when its answer is missed
                connection.send(sent)

    def _receive(self) -> list[Any] | None:
        found = []
        for connection in self.connections:
            try:
                if not connection.poll(PATIENCE):
                    return None
                found.append(connection.recv())
            except (EOFError, OSError):
                return None
        return found


def _verdict(found: list[Any] | None) -> Verdict:
    if found is None:
        return Verdict(RAISED, said="a rank died or did not answer")
    raised = [said for what, said in found if what == "raised"]
    if raised:
        own = [said for said in raised if not said.startswith("Disagreement: a rank")]
        return Verdict(RAISED, said=(own or raised)[0])
    error = max(e for _, e in found)
    return Verdict(SAME if error < EQUAL else CHANGED, error)


def _verdict_on_masks(found: list[Any] | None) -> Verdict:
    """Exactly those ranks draw alike that drop elements of one value; none from torch's generator."""
    if found is None or any(what == "raised" for what, _ in found):
        return _verdict(found)
    drawn = [masks for _, (masks, _) in found]
    wrong = any(
        _alike([x for x, _ in ranks]) != _alike([mask for _, mask in ranks])
        for ranks in zip(*drawn, strict=True)
    )
    others = any(disturbed for _, (_, disturbed) in found)
    return Verdict(CHANGED if wrong or others else SAME)


def _alike(digests: list[str]) -> list[int]:
    """The first rank that has what each rank has."""
    return [digests.index(d) for d in digests]
