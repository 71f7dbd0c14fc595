"""A collective that failed: which one it was, of which layer, and which rank is missing.

A rank that dies or hangs shows on the others as an error of the backend ("Connection closed by
peer", "Timed out waiting 1800000ms for recv operation") that knows neither. Nothing is written down
while a step goes well: the place is found afterwards, from the line of the rank's graph that stands
on the stack. The missing rank is found by a roll call over the store by which the ranks met: a thread
of every process looks every half second whether one is called, and answers with what its process is
doing; who is dead or stopped does not answer.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from weakref import WeakValueDictionary

import torch.distributed as dist
from torch import fx
from torch.distributed.distributed_c10d import PrefixStore, Store

from autoshard.compat import default_store
from autoshard.errors import CollectiveError
from autoshard.paths import module_path

INTERVAL = 0.5  # seconds between two looks whether the roll is called
GRACE = 3.0  # seconds that a rank has to answer

# The file name of a graph's generated code, which is its own, and the instruction in it. The number of
# the line is found when it is needed: to find it takes a walk through the code, of 35 us for 12 layers.
Line = tuple[str, int]

_graphs: WeakValueDictionary[str, fx.GraphModule] = WeakValueDictionary()
_files: dict[str, str] = {}  # of all graphs there ever were -> their pass; asked at every collective


def know(module: fx.GraphModule, way: str = "forward") -> None:
    """Have failures in this graph named by node and layer.

    way: "backward" of a graph that computes gradients. A node that computes what another one does, or
        that one's gradient, is called by its name: ``meta["stands_for"]``.
    """
    file = type(module).forward.__code__.co_filename
    _graphs[file] = module
    _files[file] = way


def line_of_graph() -> Line | None:
    """The line of a known graph that calls the caller: for a backward pass, which has no such line."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(8):
        if frame is None:
            return None
        if frame.f_code.co_filename in _files:
            return frame.f_code.co_filename, frame.f_lasti
        frame = frame.f_back
    return None


def way_and_line(depth: int) -> tuple[str, Line | None]:
    """Whether this runs in a forward or a backward pass, and where in a known graph.

    depth: calls between this one and what an operator of the graph called.
    """
    try:  # the graph's, most often: each frame that is looked at takes 3 us
        frame: FrameType | None = sys._getframe(depth + 2)
    except ValueError:  # the stack is not that deep
        frame = None
    if frame is None or frame.f_code.co_filename not in _files:
        frame = sys._getframe(depth + 1)
    for _ in range(6):
        if frame is None:
            break
        code = frame.f_code
        if code.co_filename in _files:
            return _files[code.co_filename], (code.co_filename, frame.f_lasti)
        if code.co_name == "backward" and "ctx" in frame.f_locals:
            return "backward", getattr(frame.f_locals["ctx"], "line", None)
        frame = frame.f_back
    return "", None


def place_of(way: str, line: Line | None) -> Place:
    """What ``way_and_line`` found."""
    return Place("Python") if line is None else _of_line(line, way)


@dataclass(frozen=True)
class Place:
    """What a process is doing: a node of its graph, its layer, and the pass; or a line of Python."""

    what: str
    layer: str = ""
    node: str = ""

    def __str__(self) -> str:
        if not self.node:
            return self.what
        return f"{self.what} at {self.layer or 'the top of the model'} (node {self.node})"


def place(frame: FrameType | None) -> Place:
    """What a stack is doing, from its innermost frame."""
    own = None
    while frame is not None:
        if frame.f_code.co_filename in _graphs:
            file = frame.f_code.co_filename
            return _of_line((file, frame.f_lasti), _files[file])
        if frame.f_code.co_name == "run_node" and isinstance(node := frame.f_locals.get("n"), fx.Node):
            return _of_node(node, "forward")
        if frame.f_code.co_name == "backward" and "ctx" in frame.f_locals:
            line = getattr(frame.f_locals["ctx"], "line", None)
            if line is not None:
                return _of_line(line, "backward")
        if own is None and not any(part in frame.f_code.co_filename for part in _MACHINERY):
            file = os.path.basename(frame.f_code.co_filename)
            own = f"{frame.f_code.co_qualname} ({file}:{frame.f_lineno})"
        frame = frame.f_back
    return Place(own or "Python")


# Files whose frames say nothing of what a process is doing.
_MACHINERY = (
    f"{os.sep}torch{os.sep}", f"autoshard{os.sep}groups.py", f"autoshard{os.sep}failures.py",
    f"{os.sep}contextlib.py", f"{os.sep}threading.py", "<",
)  # fmt: skip


def _of_line(line: Line, way: str) -> Place:
    module = _graphs.get(line[0])
    if module is None:
        return Place(f"the {way} of a graph")
    lines = type(module).forward.__code__.co_lines()
    number = next((n for begin, end, n in lines if begin <= line[1] < end and n), None)
    if number is None:
        return Place(f"the {way} of a graph")
    name = module.code.splitlines()[number - 1].partition("=")[0].strip()
    node = next((n for n in module.graph.nodes if n.name == name), None)
    return Place(f"the {way} of a graph") if node is None else _of_node(node, way)


# Fused calls, by the collective that the graph has which people read.
_COMMUNICATES_AS = {"column_linear": "copy", "row_linear": "reduce"}


def _of_node(node: fx.Node, way: str) -> Place:
    node = node.meta.get("stands_for", node)
    target = str(getattr(node.target, "__name__", node.target))
    target = _COMMUNICATES_AS.get(target, target)
    # What enters a layer was made by the one before.
    users = list(node.users) if target in ("copy", "scatter") else []
    return Place(f"the {way} of {target}", module_path(users[0] if users else node), node.name)


def position() -> str:
    """What this process is doing, as seen from another thread: in a backward pass, on any thread."""
    frames = sys._current_frames()
    main = threading.main_thread().ident
    found = [place(frames[main])] if main in frames else []
    found += [place(f) for t, f in frames.items() if t not in (main, threading.get_ident())]
    return str(next((p for p in found if p.node), found[0] if found else Place("Python")))


@contextlib.contextmanager
def explained(collective: str, ranks: Sequence[int]) -> Iterator[None]:
    """Errors of a collective among `ranks` (of the world) become a CollectiveError that names it."""
    try:
        yield
    except RuntimeError as error:
        raise explanation_of(error, collective, ranks) from error


def explanation_of(error: RuntimeError, collective: str, ranks: Sequence[int]) -> CollectiveError:
    """The error for what the backend said of a collective that the caller asked for."""
    said = f"The backend says: {' '.join(str(error).split())}"
    return explanation(place(sys._getframe(1)), collective, ranks, "failed", said)


def explanation(
    where: Place, collective: str, ranks: Sequence[int], what: str, said: str
) -> CollectiveError:
    """The error for a collective that failed or stands still, after the roll was called."""
    rank = dist.get_rank()
    found = _roll_call.called(str(where)) if _roll_call is not None else None
    message = (
        f"{where}: an {collective} among the ranks {', '.join(map(str, ranks))} {what} on rank {rank}"
    )
    missing: tuple[int, ...] = ()
    if found is None:
        message += "; which rank is missing could not be found out, there is no store to ask"
    elif found.missing:
        missing = found.missing
        several = len(missing) > 1
        message += (
            f", because rank{'s' * several} {', '.join(map(str, missing))} "
            f"{'do' if several else 'does'} not answer: dead or stopped. Look for the end of "
            f"{'their' if several else 'its'} output, and for a kill by the kernel (out of memory)"
        )
    else:
        others = "; ".join(f"rank {r} is in {w}" for r, w in found.answers.items() if r != rank)
        message += (
            f", but every rank answers: {others}. A rank that is elsewhere got other inputs, took "
            "another branch, or was too slow for the process group's timeout"
        )
    message += (
        ". The process group cannot be used any more: end all ranks and start again from a checkpoint. "
        f"{said}"
    )
    return CollectiveError(message, missing)


@dataclass(frozen=True)
class Roll:
    """Who answered, and what they were doing; and who did not. Ranks of the world."""

    answers: dict[int, str]
    missing: tuple[int, ...]


class _RollCall:
    """The roll over the default store. Keys: calls (a count), <call>/<rank> (an answer), and result.

    The first result stands for all: a rank that fails later, because its neighbours ended, would
    miss these too.
    """

    def __init__(self, store: Store, second: Store) -> None:
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self._calling = PrefixStore("autoshard/roll", store)
        self._listening = PrefixStore("autoshard/roll", second)
        self._group = dist.group.WORLD
        self._known: bytes = b""
        self._ended = threading.Event()
        self.thread = threading.Thread(target=self._listen, name="autoshard roll call", daemon=True)
        self.thread.start()
        atexit.register(self._end)

    def _end(self) -> None:
        """Joined before the interpreter ends: a thread that comes back from the store after that is
        unwound through C++ code that may not throw, and the process aborts."""
        self._ended.set()
        self.thread.join(GRACE)  # longer only where the store itself is stopped

    def alive(self) -> bool:
        """Whether this process still answers for the process group that there is now."""
        return self.thread.is_alive() and self._group is dist.group.WORLD

    def _listen(self) -> None:
        answered = 0
        try:
            while not self._ended.wait(INTERVAL) and self._group is dist.group.WORLD:
                calls = self._listening.add("calls", 0)
                for call in range(answered + 1, calls + 1):
                    self._listening.set(f"{call}/{self.rank}", position())
                answered = calls
                if calls and not self._known and self._listening.check(["result"]):
                    self._known = self._listening.get("result")
        except RuntimeError:  # the store has gone
            return

    def called(self, where: str) -> Roll:
        """Call the roll, or take the result of the first who did. Takes up to about 2 `GRACE`."""
        if not self._known:
            thread = threading.Thread(target=self._call, args=(where,), daemon=True)
            thread.start()
            thread.join(2 * GRACE)
        if self._known:
            result = json.loads(self._known)
            return Roll({int(r): w for r, w in result["answers"].items()}, tuple(result["missing"]))
        # The store itself is dead or stopped: its process is the first rank's, or torchrun's.
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return Roll({self.rank: where}, () if agent or self.rank == 0 else (0,))

    def _call(self, where: str) -> None:
        store, answers = self._calling, {self.rank: where}
        try:
            call = store.add("calls", 1)
            end = time.monotonic() + GRACE
            while len(answers) < self.world and time.monotonic() < end:
                time.sleep(0.02)
                for rank in set(range(self.world)) - set(answers):
                    if store.check([f"{call}/{rank}"]):
                        answers[rank] = store.get(f"{call}/{rank}").decode()
            missing = sorted(set(range(self.world)) - set(answers))
            result = json.dumps({"answers": answers, "missing": missing})
            first = store.compare_set("result", "", result)
            time.sleep(2 * INTERVAL)  # this process may keep the store, and end now
            self._known = first
        except RuntimeError:
            return


_roll_call: _RollCall | None = None


def answer_roll_calls() -> None:
    """Answer from now on when another rank asks who is there. Once per process group is enough."""
    global _roll_call
    if _roll_call is not None and _roll_call.alive():
        return
    stores = default_store(), default_store()
    if stores[0] is not None and stores[1] is not None and dist.get_world_size() > 1:
        _roll_call = _RollCall(stores[0], stores[1])
