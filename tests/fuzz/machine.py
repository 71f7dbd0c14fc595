"""The state machine: models, plans, modes, dtypes, shapes, saves and steps in any order."""

from __future__ import annotations

import atexit
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import autoshard
from autoshard import AutoshardError, Plan
from autoshard.errors import PlanError
from autoshard.sharded import Sharded
from tests.fuzz.build import build
from tests.fuzz.counts import COUNTS, is_refusal
from tests.fuzz.draw import few, nets
from tests.fuzz.laws import CAPTURED, Broken, Shape, Subject, inputs_of, law
from tests.fuzz.pair import DTYPES, Pair
from tests.fuzz.ranks import Ranks
from tests.fuzz.spec import Net

TPS = (2, 4, 3)
SHAPES = st.tuples(st.integers(2, 5), st.integers(2, 9))
LESS = st.tuples(st.integers(1, 4), st.integers(1, 9))

MOVES: st.SearchStrategy[tuple[Any, ...]] = st.one_of(
    st.tuples(st.just("same"), LESS, st.integers(1, 9)),
    st.tuples(st.just("mode"), st.booleans()),
    st.tuples(st.just("to"), few(sorted(DTYPES))),
    st.tuples(st.just("train"), SHAPES, st.integers(1, 9), few(("sgd", "adamw")), st.booleans()),
    st.tuples(st.just("reload"), few(("file", "other values", "own", "copy"))),
)

RANKS = Ranks(2)
atexit.register(RANKS.stop)


class Machine(RuleBasedStateMachine):
    """One model at a time, on simulated ranks, on one rank, and on rank processes."""

    spec: Net | None = None

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.files = 0

    def teardown(self) -> None:
        """Leave nothing behind."""
        self.folder.cleanup()

    def file(self) -> Path:
        """A new file."""
        self.files += 1
        return Path(self.folder.name) / f"{self.files}.json"

    # -- the model ---------------------------------------------------------------------------------

    @initialize(spec=nets(), tp=few(TPS))
    def first(self, spec: Net, tp: int) -> None:
        """Begin with a model in train mode, in float64, at the largest degrees."""
        self.model(spec, tp)

    @rule(spec=nets(), tp=few(TPS))
    def model(self, spec: Net, tp: int) -> None:
        """Another model."""
        COUNTS.add("rules", "model")
        COUNTS.model(spec)
        self.spec, self.tp = spec, tp
        self.training, self.dtype = True, "float64"
        self.single: Pair | None = None
        self.real = False
        self.subject: Subject | None = None
        note(f"spec = {spec!r}")
        self.captured()

    @precondition(lambda self: self.subject is not None)
    @rule(training=st.booleans(), dtype=few(sorted(DTYPES)))
    def signature(self, training: bool, dtype: str) -> None:
        """Train or eval, and another dtype: captured again, under the same degrees."""
        COUNTS.add("rules", "signature")
        degrees = self.plan.degrees
        self.training, self.dtype = training, dtype
        self.captured()
        if self.subject is not None and degrees.keys() == self.plan.degrees.keys():
            self.planned(degrees)

    def captured(self) -> None:
        """Capture; then all laws at the largest degrees."""
        assert self.spec is not None
        self.subject = None
        made = self.allowed(lambda: Subject(self.spec, self.training, DTYPES[self.dtype], TPS))
        if made is not None:
            self.subject = made
            self.planned("max")

    # -- plans -------------------------------------------------------------------------------------

    @precondition(lambda self: self.subject is not None)
    @rule(data=st.data())
    def degrees(self, data: st.DataObject) -> None:
        """A degree for each region."""
        COUNTS.add("rules", "degrees")
        plan = self.plan
        for region in plan.regions:
            plan = plan.with_degree(region.name, data.draw(few(region.degrees), label=region.name))
        self.planned(plan.degrees)
        law(self.plan.degrees == plan.degrees, "a plan's degrees are those asked for")

    @precondition(lambda self: self.subject is not None)
    @rule(tp=few(TPS))
    def another_tp(self, tp: int) -> None:
        """Other numbers of ranks."""
        COUNTS.add("rules", "another tp")
        self.tp = tp
        self.planned("max")

    @precondition(lambda self: self.subject is not None)
    @rule()
    def saved(self) -> None:
        """A plan that is saved and read again gives the same graph."""
        COUNTS.add("rules", "saved plan")
        file = self.file()
        self.plan.save(file)
        read = Plan.load(file)
        law(read.degrees == self.plan.degrees and read.tp == self.tp, "a plan that is read again")
        law(read.fingerprint == self.plan.fingerprint, "its fingerprint")
        before = self.hash
        self.planned(read.degrees)
        law(self.hash == before, "the graph of a plan that is read again")
        COUNTS.add("laws", "plan saved and read: the same graph")

    @precondition(lambda self: self.subject is not None)
    @rule(other=nets())
    def foreign(self, other: Net) -> None:
        """A plan is refused by a model with other parameters."""
        COUNTS.add("rules", "plan of another model")
        assert self.spec is not None
        model = build(other)
        shapes = [[(n, p.shape) for n, p in m.named_parameters()] for m in (build(self.spec), model)]
        file = self.file()
        self.plan.save(file)
        try:
            autoshard.plan(model, self.tp, inputs_of(other, CAPTURED), plan=file, hardware="cpu")
        except PlanError as error:
            law("made for another model" in str(error) or shapes[0] == shapes[1], str(error))
            COUNTS.add("laws", "plan of another model refused")
        except AutoshardError as error:
            law(is_refusal(error), f"{type(error).__name__}: {error}")
        else:
            law(shapes[0] == shapes[1], "a plan of another model is refused")

    def planned(self, request: Any) -> None:
        """Plan and rewrite, and check all that must hold."""
        assert self.subject is not None
        found = self.allowed(lambda: self.subject.plan(self.tp, request))
        if found is None:
            self.subject = None
            return
        self.plan: Plan = found[0]
        self.sharded: Sharded = found[1]
        COUNTS.add("plans", "mixed" if len({d for d in self.plan.degrees.values()}) > 1 else "even")
        self.hash = self.subject.deterministic(self.tp, self.plan, self.sharded)
        COUNTS.add("laws", "rewriting twice gives the same graph")
        self.subject.shares_gather(self.sharded, self.tp)
        COUNTS.add("laws", "parameters cut and gathered are equal", len(self.sharded.stored))
        self.compared(CAPTURED)

    # -- shapes ------------------------------------------------------------------------------------

    @precondition(lambda self: self.subject is not None)
    @rule(shape=SHAPES)
    def shape(self, shape: Shape) -> None:
        """The same graph at a shape that was never captured."""
        COUNTS.add("rules", "shape")
        assert self.subject is not None
        if self.subject.holds(shape):
            self.compared(shape)
            COUNTS.add("laws", "the same function at a shape never captured")
        else:
            COUNTS.add("laws", "shapes that a graph says it does not hold for")

    def compared(self, shape: Shape) -> None:
        """Outputs and gradients on simulated ranks."""
        assert self.subject is not None
        self.subject.same_function(self.tp, self.plan, self.sharded, shape)
        COUNTS.add("laws", f"the same function, {self.dtype}")

    # -- what runs ---------------------------------------------------------------------------------

    @precondition(lambda self: self.subject is not None)
    @rule(move=MOVES)
    def one_rank(self, move: tuple[Any, ...]) -> None:
        """At tp=1, in this process, the split model is the model."""
        COUNTS.add("rules", "one rank")
        assert self.spec is not None
        if self.single is None:
            self.single = self.allowed(
                lambda: Pair(self.spec, 1, "max", None, self.training, self.dtype)
            )
            if self.single is None:
                return
            self.single.begin()
            law(
                not any(
                    n.op == "get_attr" and str(n.target) != "tp1" for n in self.single.split.graph.nodes
                ),
                "tp=1: a graph without groups",
            )
            self.single.same(CAPTURED, 0)
        self.moved(lambda name, *rest: getattr(self.single, name)(*rest), move, "one rank")

    @precondition(lambda self: self.subject is not None)
    @rule(move=MOVES, planned=st.booleans())
    def rank_processes(self, move: tuple[Any, ...], planned: bool) -> None:
        """On two processes that hash strings differently."""
        COUNTS.add("rules", "rank processes")
        if not self.real:
            file = None
            if planned and self.tp == 2:
                file = self.file()
                self.plan.save(file)
            degree = "max" if planned else "auto"
            arguments = (self.spec, 2, degree, file, self.training, self.dtype)
            if self.allowed(lambda: RANKS.call("begin", *arguments)) is None:
                return
            self.real = True
            RANKS.call("same", CAPTURED, 0)
            COUNTS.add("laws", "the same plan and graph on every rank process")
        self.moved(RANKS.call, move, "rank processes")

    def moved(self, call: Any, move: tuple[Any, ...], where: str) -> None:
        """Make a move; a file's folder is added to a reload."""
        name, *rest = move
        if name == "reload":
            rest = [*rest, Path(self.folder.name)]
        if self.allowed(lambda: call(name, *rest)) is not None:
            COUNTS.add("laws", f"{where}: {name}")

    def allowed(self, made: Any) -> Any:
        """What a call gives; None where it is refused."""
        try:
            return made()
        except AutoshardError as error:
            if not is_refusal(error):
                raise Broken(f"{type(error).__name__}: {error}") from error
            COUNTS.refused(error)
            return None
