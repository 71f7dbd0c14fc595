"""parallelize on real processes: the same function, gradients, state and communication."""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel
from torch.utils import _pytree as pytree

import autoshard
from autoshard import measures, parameters, pipeline, rehearsal
from autoshard.capture import Captured
from autoshard.exactly import edit_exactly, exactly
from autoshard.signatures import plan_hash
from tests.distributed import run_distributed
from tests.models import nanogpt, plain
from tests.models.case import Case

TOLERANCE = 1e-10

# A world that stays


class Ranks:
    """A world of processes that stays: each call runs one function on every rank.

    A rank that raises or hangs ends the world, and the next call starts another.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self._thread: threading.Thread | None = None

    def __call__(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """`fn(*args)` on every rank; the results by rank."""
        if self._thread is None:
            self._start()
        job = self._folder / f"{self._jobs}.job"
        results = [self._folder / f"{self._jobs}.{rank}" for rank in range(self.world)]
        self._jobs += 1
        _write(job, (fn, args))
        assert self._thread is not None
        while not all(result.exists() for result in results):
            if not self._thread.is_alive():
                self.close()
                raise self._error or RuntimeError("the ranks ended without a word")
            time.sleep(0.005)
        return [pickle.loads(result.read_bytes()) for result in results]

    def close(self) -> None:
        """End the processes."""
        if self._thread is not None:
            (self._folder / "stop").touch()
            self._thread.join()
            self._thread = None
            self._owner.cleanup()

    def _start(self) -> None:
        self._owner = tempfile.TemporaryDirectory()
        self._folder = Path(self._owner.name)
        self._jobs = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            run_distributed(_serve, self.world, self._folder, timeout=570.0)
        except BaseException as error:
            self._error = error


def _write(path: Path, value: Any) -> None:
    unfinished = path.with_suffix(path.suffix + ".tmp")
    unfinished.write_bytes(pickle.dumps(value))
    unfinished.rename(path)


def _serve(folder: Path) -> None:
    """A rank of `Ranks`: runs one job after the other until it is told to stop."""
    parent = multiprocessing.parent_process()
    rank, number = int(os.environ["RANK"]), 0
    while not (folder / "stop").exists():
        job = folder / f"{number}.job"
        if not job.exists():
            if parent is not None and not parent.is_alive():
                return
            time.sleep(0.01)
            continue
        faulthandler.dump_traceback_later(120, exit=True)
        torch.manual_seed(0)
        fn, args = pickle.loads(job.read_bytes())
        _write(folder / f"{number}.{rank}", fn(*args))
        faulthandler.cancel_dump_traceback_later()
        number += 1


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two processes."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    """Four processes."""
    ranks = Ranks(4)
    yield ranks
    ranks.close()


# What the ranks run


def case(name: str) -> Case:
    """A case of the test models; transformers is imported only where it is needed."""
    known = {c.name: c for c in (*nanogpt.CASES, *plain.CASES)}
    if name in known:
        return known[name]
    from tests.models import huggingface

    return huggingface.case(name)


def sample(
    name: str, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in train mode, without dropout, and a batch for it."""
    one = case(name)
    model = one.build("sdpa", dropout=0.0, seed=seed)
    return model.to(dtype), one.inputs(model)


CAPTURED: dict[Any, Captured] = {}


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Captured graphs lose their casts to float32, as ``exactly`` takes them from the model.

    And each is captured once in a process, which is nearly all of the time that a test takes.
    """
    original = pipeline.capture

    def capture(model: nn.Module, args: Any, kwargs: Any) -> Captured:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        signature = [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves]
        weights = [(n, p.dtype, p.requires_grad) for n, p in model.named_parameters()]
        config = getattr(model, "config", None)
        key = str((model, config, model.training, spec, signature, weights))
        if key not in CAPTURED:
            CAPTURED[key] = original(model, args, kwargs)
            edit_exactly(torch.float64)(CAPTURED[key].graph)
        module = CAPTURED[key].graph.owning_module
        return replace(CAPTURED[key], graph=copy.deepcopy(module).graph)

    with mock.patch.object(pipeline, "capture", capture):
        yield


def split(
    model: nn.Module, tp: int, batch: Any, degrees: dict[str, int] | None = None, **options: Any
) -> autoshard.ParallelModule:
    """The model split exactly, with the degrees of some regions changed."""
    with exact():
        if degrees:
            plan = autoshard.plan(model, tp, batch, degree="max")
            for region, degree in degrees.items():
                plan = plan.with_degree(region, degree)
            options["plan"] = plan
        return autoshard.parallelize(model, tp, batch, **({"degree": "max"} | options))


def loss_of(outputs: Any) -> Tensor:
    """The loss among a model's outputs."""
    found = outputs.loss if hasattr(outputs, "loss") else outputs[1]
    assert isinstance(found, Tensor)
    return found


def whole(value: Any) -> Any:
    """The whole of what may be a DTensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_gradients(tp_model: autoshard.ParallelModule) -> dict[str, Tensor]:
    """Every parameter's gradient, whole, in the model's order."""
    return {
        name: torch.zeros(p.shape, dtype=p.dtype)
        if p.grad is None
        else parameters.whole(p.grad, tp_model.share_of(name))
        for name, p in tp_model.named_parameters()
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient, zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()
    }


def error(found: Any, expected: Any, largest: float = 0.0) -> float:
    """``max|a - b| / max(max|b|, 1e-6 * largest)``."""
    if not isinstance(expected, Tensor):
        return 0.0 if found == expected else float("inf")
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    scale = max(expected.abs().max().item(), 1e-6 * largest, 1e-300)
    difference = (found - expected).abs().max().item()
    return difference / scale if difference == difference else float("inf")


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The error of each tensor, relative to its own size or that of the largest of all."""
    assert list(found) == list(expected)
    largest = max(value.abs().max().item() for value in expected.values())
    return {name: error(found[name], value, largest) for name, value in expected.items()}


def output_errors(found: Any, expected: Any) -> dict[str, float]:
    """The error of each output, and whether they are put together alike."""
    assert type(found) is type(expected)
    leaves, spec = pytree.tree_flatten_with_path(expected)
    found_leaves, found_spec = pytree.tree_flatten(found)
    assert spec == found_spec
    return {
        f"output {pytree.keystr(path)}": error(whole(one), value)
        for one, (path, value) in zip(found_leaves, leaves, strict=True)
    }


def bad(found: dict[str, float], tolerance: float = TOLERANCE) -> dict[str, float]:
    """The errors over the tolerance."""
    return {name: value for name, value in found.items() if not value < tolerance}


def step_errors(
    model: nn.Module, tp_model: autoshard.ParallelModule, batch: dict[str, Tensor]
) -> dict[str, float]:
    """One step's outputs and gradients of a split model against those of the model."""
    with exactly(torch.float64):
        expected = model(**batch)
        loss_of(expected).backward()
    found = tp_model(**batch)
    loss_of(found).backward()
    return {
        **output_errors(found, expected),
        **errors(whole_gradients(tp_model), gradients(model)),
    }


def training(
    name: str, tp: int, degrees: dict[str, int] | None = None, options: Any = None
) -> dict[str, Any]:
    """One step compared in all, then three of AdamW with clipped gradients."""
    model, batch = sample(name)
    with exact():
        tp_model = split(model, tp, batch, degrees, **(options or {}))
        first = step_errors(model, tp_model, batch)
        optimizers = [torch.optim.AdamW(m.parameters(), 1e-3) for m in (model, tp_model)]
        norms, losses = {}, {}
        for step in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            with exactly(torch.float64):
                expected = loss_of(model(**batch))
                expected.backward()
            found = loss_of(tp_model(**batch))
            found.backward()
            losses[f"loss {step}"] = error(found, expected)
            expected = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            norms[f"norm {step}"] = error(
                whole(nn.utils.clip_grad_norm_(tp_model.parameters(), 0.5)), expected
            )
            for optimizer in optimizers:
                optimizer.step()
    return {
        "step": bad(first),
        "compared": len(first),
        "losses": bad(losses),
        "norms": bad(norms),
        "weights": bad(errors(tp_model.full_state_dict(), dict(model.state_dict())), 1e-8),
        "degrees": tp_model.plan.degrees,
        "mesh": next(iter(tp_model.parameters())).device_mesh.shape,  # type: ignore[attr-defined]
        "last loss": loss_of(tp_model(**batch)).item(),
    }


def assert_trained(ranks: list[dict[str, Any]]) -> None:
    """Nothing was off on any rank, and all ranks have the same loss."""
    for rank, found in enumerate(ranks):
        for what in ("step", "losses", "norms", "weights"):
            assert found[what] == {}, f"rank {rank}: {what}"
        assert found["compared"] > 20
        assert found["last loss"] == ranks[0]["last loss"]


# Training


def nanogpt_from_environment() -> dict[str, Any]:
    """As a script under torchrun: no process group yet, inputs not given, no edit of the graph."""
    assert not dist.is_initialized()
    model, batch = sample("nanogpt")
    tp_model = autoshard.parallelize(model, 2, batch, degree="max")
    assert dist.get_backend() == "gloo"
    assert tp_model.mesh is not None and tp_model.mesh.mesh_dim_names == ("tp",)
    expected = model(**batch)
    loss_of(expected).backward()
    found = tp_model(**batch)
    loss_of(found).backward()
    return {
        **output_errors(found, expected),
        **errors(whole_gradients(tp_model), gradients(model)),
        "state": max(errors(tp_model.full_state_dict(), model.state_dict()).values()),
    }


def test_two_processes_under_torchrun() -> None:
    """parallelize starts the process group; outputs, loss and all gradients equal the model's."""
    for found in run_distributed(nanogpt_from_environment, 2, process_group=False):
        assert bad(found) == {}
        assert len(found) == 31


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama-kv2", "t5", "nanogpt"])
def test_training_on_two(two: Ranks, name: str) -> None:
    """Outputs, loss, gradients, clipping and three AdamW steps equal the model's at tp=2."""
    assert_trained(two(training, name, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama-kv2", "t5", "nanogpt"])
def test_training_on_four(four: Ranks, name: str) -> None:
    """The same at tp=4, where Llama has fewer key/value heads than there are ranks."""
    ranks = four(training, name, 4)
    assert_trained(ranks)
    assert set(ranks[0]["degrees"].values()) == {4}
    assert ranks[0]["mesh"] == (4,)


GPT2_MIXED = {"transformer.h.0.mlp": 2, "transformer.h.1.attn": 1, "transformer.h.1.mlp": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "degrees", "mesh"),
    [
        ("gpt2", GPT2_MIXED, (2, 2)),
        ("gpt2", {"transformer.wte": 2, "transformer.h.0.attn": 2}, (2, 2)),
        ("gpt2", {"transformer.wte": 1, "transformer.h.0.mlp": 1}, (4,)),
        ("llama-kv2", {"model.layers.0.self_attn": 2, "lm_head": 2}, (2, 2)),
    ],
)
def test_regions_of_different_degree(
    four: Ranks, name: str, degrees: dict[str, int], mesh: tuple[int, ...]
) -> None:
    """Degrees 1, 2 and 4 in one model at tp=4; the mesh is factored only where one needs it."""
    ranks = four(training, name, 4, degrees)
    assert_trained(ranks)
    assert ranks[0]["degrees"].items() >= degrees.items()
    assert ranks[0]["mesh"] == mesh


def simulated(name: str, tp: int, degrees: dict[str, int]) -> dict[str, float]:
    """The simulator's outputs and gradients against those of the real ranks, bit for bit."""
    model, batch = sample(name)
    tp_model = split(model, tp, batch, degrees, logits="whole")
    outputs = pytree.tree_leaves(tp_model(**batch))
    measures.objective(outputs).backward()
    compiled = tp_model._last
    expected, expected_gradients = rehearsal.simulated(
        model, compiled.program, compiled.sharded, tp_model.plan, (), batch
    )
    rank = dist.get_rank()
    found = {
        f"output {i}": error(output, expected[rank][i])
        for i, output in enumerate(outputs)
        if isinstance(output, Tensor)
    }
    for parameter, gradient in whole_gradients(tp_model).items():
        copies = expected_gradients[parameter]
        found[parameter] = max(error(gradient, one) for one in copies)
    return found


@pytest.mark.slow
def test_the_simulator_and_the_processes_agree(two: Ranks, four: Ranks) -> None:
    """One graph, run by threads and by processes: the same outputs and gradients."""
    for found in two(simulated, "gpt2", 2, {}):
        assert bad(found, 1e-300) == {}  # the sum of two numbers has no order
    for found in four(simulated, "llama-kv2", 4, {"model.layers.1.mlp": 2}):
        assert bad(found, 1e-13) == {}


# Communication


def gpt2_communication(tp: int) -> dict[str, dict[str, int]]:
    """Collectives by name in each part of a training step, and in inference."""
    model, batch = sample("gpt2", torch.float32)
    tp_model = autoshard.parallelize(model, tp, batch, degree="max", check_inputs=False)
    optimizer = torch.optim.AdamW(tp_model.parameters(), 1e-3)

    def counted(part: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
        with CommDebugMode() as mode:
            result = part()
        return result, {str(op): n for op, n in mode.get_comm_counts().items()}

    loss, forward = counted(lambda: tp_model(**batch).loss)
    _, backward = counted(loss.backward)
    _, step = counted(optimizer.step)
    tp_model.eval()
    with torch.no_grad():
        tp_model(batch["input_ids"])  # captured here
        _, inference = counted(lambda: tp_model(batch["input_ids"]))
    return {"forward": forward, "backward": backward, "step": step, "inference": inference}


@pytest.mark.slow
def test_collectives_of_a_step(two: Ranks) -> None:
    """Two all-reduces per layer and way, 1 embedding, 2 loss, 1 output embedding; no more."""
    layers = 2
    for found in two(gpt2_communication, 2):
        assert found["forward"] == {"c10d.allreduce_": 2 * layers + 1 + 2}
        assert found["backward"] == {"c10d.allreduce_": 2 * layers + 1}
        assert found["step"] == {}
        assert found["inference"].pop("c10d.allreduce_") == 2 * layers + 1
        assert list(found["inference"].values()) == [1]  # the logits, gathered for the caller


# Meshes


def data_parallel() -> dict[str, Any]:
    """A world of 4 at tp=2: each pair of ranks trains on a batch of its own."""
    model, _ = sample("gpt2")
    batches = [case("gpt2").inputs(model, seed=seed) for seed in range(2)]
    tp_model = split(model, 2, batches[0])
    mesh = tp_model.mesh
    assert mesh is not None
    own = mesh.get_local_rank("dp")
    found = step_errors(model, tp_model, batches[own])
    return {
        "errors": bad(found),
        "names": mesh.mesh_dim_names,
        "shape": mesh.shape,
        "ranks": mesh.mesh.tolist(),
        "place": (own, mesh.get_local_rank("tp")),
    }


@pytest.mark.slow
def test_a_larger_world_is_data_parallel(four: Ranks) -> None:
    """The mesh is dp x tp, ranks of one model are neighbours, replicas do not meet."""
    ranks = four(data_parallel)
    for found in ranks:
        assert found["errors"] == {}
        assert found["names"] == ("dp", "tp")
        assert found["shape"] == (2, 2)
        assert found["ranks"] == [[0, 1], [2, 3]]
    assert [found["place"] for found in ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def given_meshes() -> dict[str, Any]:
    """A mesh of the caller's: all ranks, two dimensions, a slice of a larger one."""
    model, batch = sample("nanogpt")
    meshes: dict[str, DeviceMesh] = {
        "all": init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)),
        "two": init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")),
        "slice": init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))["tp"],
    }
    found: dict[str, Any] = {}
    for name, mesh in meshes.items():
        tp_model = split(model, mesh["tp"].size(), batch, mesh=mesh)
        assert tp_model.mesh is mesh
        model.zero_grad()
        found[name] = bad(step_errors(model, tp_model, batch))
    try:
        autoshard.parallelize(model, 2, batch, mesh=meshes["all"], degree="max")
    except ValueError as error:
        found["wrong"] = str(error)
    return found


@pytest.mark.slow
def test_a_given_mesh_is_used(four: Ranks) -> None:
    """A DeviceMesh with the dimension tp, alone or beside others; its size must be tp."""
    for found in four(given_meshes):
        wrong = found.pop("wrong")
        assert found == {"all": {}, "two": {}, "slice": {}}
        assert "tp=2" in wrong and "4 ranks" in wrong


def test_one_rank_in_a_plain_script() -> None:
    """tp=1 needs no process group: plain tensors, and bit for bit what the model computes."""
    assert not dist.is_initialized() and "WORLD_SIZE" not in os.environ
    model, batch = sample("nanogpt", torch.float32)
    tp_model = autoshard.parallelize(model, 1, batch, degree="max")
    assert not dist.is_initialized()
    assert tp_model.mesh is None
    expected, found = model(**batch), tp_model(**batch)
    loss_of(expected).backward()
    loss_of(found).backward()
    for one, other in zip(found, expected, strict=True):
        assert type(one) is Tensor and torch.equal(one, other)
    for name, parameter in tp_model.named_parameters():
        assert type(parameter) is nn.Parameter
        assert torch.equal(parameter.grad, model.get_parameter(name).grad), name
    assert list(tp_model.state_dict()) == list(model.state_dict())
    tp_model.load_state_dict(model.state_dict())
    full = tp_model.full_state_dict()
    assert all(torch.equal(full[name], value) for name, value in model.state_dict().items())
    clipped = [nn.utils.clip_grad_norm_(m.parameters(), 1.0) for m in (model, tp_model)]
    assert torch.equal(*clipped)


def test_the_model_itself_is_left_alone() -> None:
    """The parallel module has weights of its own; the model can be trained on."""
    model, batch = sample("nanogpt", torch.float32)
    before = copy.deepcopy(model.state_dict())
    tp_model = autoshard.parallelize(model, 1, batch, degree="max")
    with torch.no_grad():
        for parameter in tp_model.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())


def test_a_copy_of_the_module() -> None:
    """deepcopy (a moving average of the weights) gives a module of its own."""
    model, batch = sample("nanogpt", torch.float32)
    tp_model = autoshard.parallelize(model, 1, batch, degree="max")
    loss_of(tp_model(**batch)).backward()
    copied = copy.deepcopy(tp_model)
    assert torch.equal(loss_of(copied(**batch)), loss_of(tp_model(**batch)))
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert copied.lm_head.weight is copied.transformer.wte.weight
    assert torch.equal(tp_model.lm_head.weight, model.lm_head.weight)


def moving_average() -> dict[str, Any]:
    """A copy with the weights halved: its own DTensors, the logits of the half weights."""
    model, batch = sample("gpt2", torch.float32)
    tp_model = autoshard.parallelize(model, 2, batch, degree="max")
    loss_of(tp_model(**batch)).backward()
    average = copy.deepcopy(tp_model)
    with torch.no_grad():
        for module in (model, average):
            for parameter in module.parameters():
                parameter.mul_(0.5)
    expected, found = model.state_dict(), average.full_state_dict()
    loss = loss_of(average(**batch))
    loss.backward()
    return {
        "weights": [n for n, t in expected.items() if not torch.equal(t, found[n])],
        "kept": bool((tp_model.lm_head.weight.full_tensor() == 2 * expected["lm_head.weight"]).all()),
        "loss": (float(loss), float(loss_of(model(**batch)))),
    }


@pytest.mark.slow
def test_a_copy_on_two(two: Ranks) -> None:
    """As above, over real ranks."""
    for found in two(moving_average):
        assert found["weights"] == []
        assert found["kept"]
        torch.testing.assert_close(*found["loss"])


def test_verification_of_a_partly_frozen_model() -> None:
    """A frozen parameter has no gradient on either side."""
    model, batch = sample("nanogpt")
    model.transformer.h[0].requires_grad_(False)
    report = autoshard.verify(model, 2, batch)
    assert report.ok, report


# The module


def module_face() -> dict[str, Any]:
    """train and eval, the model's attributes, other signatures."""
    model, batch = sample("gpt2")
    found: dict[str, Any] = {}
    with exact():
        tp_model = split(model, 2, batch)
        found["config"] = (tp_model.config.model_type, tp_model.config.n_layer)
        found["training"] = [tp_model.training]
        assert tp_model.eval() is tp_model
        model.eval()
        found["training"] += [tp_model.training]
        ids, labels = batch["input_ids"], batch["labels"]
        generator = torch.Generator().manual_seed(1)
        longer = torch.randint(3, 203, (2, 17), generator=generator)
        mask = torch.ones_like(longer)
        mask[0, :5] = 0
        signatures: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
            "eval": ((), batch),
            "no labels": ((), {"input_ids": ids}),
            "other shape": ((), {"input_ids": longer}),
            "one row": ((), {"input_ids": longer[:1]}),
            "one token": ((), {"input_ids": longer[:, :1]}),
            "positional": ((ids,), {}),
            "mask": ((), {"input_ids": longer, "attention_mask": mask}),
            "mask and labels": (
                (longer,),
                {"labels": longer, "attention_mask": mask},
            ),
            "reordered": ((), {"labels": labels, "input_ids": ids}),
        }
        for name, (args, kwargs) in signatures.items():
            with exactly(torch.float64):
                expected = model(*args, **kwargs)
            found[name] = bad(output_errors(tp_model(*args, **kwargs), expected))
        captured = len(tp_model._compiled)
        for args, kwargs in signatures.values():
            tp_model(*args, **kwargs)
        found["captured again"] = len(tp_model._compiled) - captured
        model.train()
        tp_model.train()
        found["training"] += [tp_model.training]
        found["after"] = bad(step_errors(model, tp_model, batch))
    return found


@pytest.mark.slow
def test_modes_attributes_and_signatures(two: Ranks) -> None:
    """train/eval switch, `.config` is there, any other way to call the model just works."""
    for found in two(module_face):
        assert found.pop("config") == ("gpt2", 2)
        assert found.pop("training") == [True, False, True]
        assert found.pop("captured again") == 0
        assert len(found) == 10
        assert {name: wrong for name, wrong in found.items() if wrong} == {}


def other_dtypes() -> dict[str, Any]:
    """The module converted after it was split."""
    model, batch = sample("gpt2", torch.float32)
    found: dict[str, Any] = {}
    with exact():
        tp_model = autoshard.parallelize(model, 2, batch, degree="max")
        tp_model.double()
        model.double()
        found["double"] = bad(step_errors(model, tp_model, batch))
        assert tp_model.to(torch.bfloat16) is tp_model
    model.to(torch.bfloat16)
    dtypes = {p.dtype for p in tp_model.parameters()}
    dtypes |= {b.dtype for b in tp_model.buffers() if b.is_floating_point()}
    found["dtypes"] = [str(d) for d in dtypes]
    found["tied"] = tp_model.lm_head.weight is tp_model.transformer.wte.weight
    with torch.no_grad():
        logits, expected = tp_model(**batch).logits, model(**batch).logits
    found["bfloat16"] = (str(logits.dtype), error(whole(logits), expected))
    found["weights"] = bad(errors(tp_model.full_state_dict(), model.state_dict()), 1e-300)
    return found


@pytest.mark.slow
def test_conversion_of_the_dtype(two: Ranks) -> None:
    """`.double()` and `.to(torch.bfloat16)` convert weights and graph, and keep ties."""
    for found in two(other_dtypes):
        assert found["double"] == {}
        assert found["dtypes"] == ["torch.bfloat16"]
        assert found["tied"]
        dtype, off = found["bfloat16"]
        assert dtype == "torch.bfloat16" and off < 0.05
        assert found["weights"] == {}


def embedded_inputs() -> dict[str, float]:
    """A float input that requires a gradient, and parameters frozen before and thawed after."""
    model, batch = sample("gpt2")
    model.transformer.h[0].requires_grad_(False)
    model.transformer.wte.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 10, 64, generator=generator, dtype=torch.float64)
    inputs = [states.clone().requires_grad_() for _ in range(2)]
    with exact():
        tp_model = split(model, 2, {"inputs_embeds": states, "labels": batch["labels"]})
        frozen = [n for n, p in tp_model.named_parameters() if not p.requires_grad]
        assert frozen == [n for n, p in model.named_parameters() if not p.requires_grad]
        with exactly(torch.float64):
            model(inputs_embeds=inputs[0], labels=batch["labels"]).loss.backward()
        tp_model(inputs_embeds=inputs[1], labels=batch["labels"]).loss.backward()
        assert all(tp_model.get_parameter(name).grad is None for name in frozen)
        found = errors(whole_gradients(tp_model), gradients(model))
        assert inputs[0].grad is not None and inputs[1].grad is not None
        found["input"] = error(inputs[1].grad, inputs[0].grad)
        for each in (model, tp_model):
            each.zero_grad()
            each.requires_grad_(True)
        thawed = step_errors(model, tp_model, batch)
    return {**found, **{f"thawed {name}": value for name, value in thawed.items()}}


@pytest.mark.slow
def test_gradients_of_inputs_and_frozen_parameters(two: Ranks) -> None:
    """An input's gradient is whole on every rank; freezing and thawing change nothing else."""
    for found in two(embedded_inputs):
        assert bad(found) == {}


# State


def state(name: str, tp: int, degrees: dict[str, int]) -> dict[str, Any]:
    """Everything that is saved and loaded, against the model."""
    model, batch = sample(name)
    tp_model = split(model, tp, batch, degrees)
    own = model.state_dict()
    saved = {n: v.clone() for n, v in tp_model.state_dict().items()}
    full = tp_model.full_state_dict()
    streamed = tp_model.full_state_dict(rank0_only=True)
    found: dict[str, Any] = {
        "keys": list(saved) == list(own),
        "shapes": all(saved[n].shape == v.shape for n, v in own.items()),
        "DTensors": all(isinstance(saved[n], DTensor) for n, _ in model.named_parameters()),
        "saved": bad(errors({n: whole(v) for n, v in saved.items()}, own), 1e-300),
        "full": bad(errors(full, own), 1e-300),
        "streamed": list(streamed),
        "parameters": [n for n, _ in tp_model.named_parameters()]
        == [n for n, _ in model.named_parameters()],
        "split": sorted({p.degree for p in tp_model.plan.parameters}),
    }
    other, _ = sample(name, seed=1)
    loading = {"plain": other.state_dict(), "own": saved}
    for source, values in loading.items():
        outcome = tp_model.load_state_dict(values)
        expected = own if source == "own" else other.state_dict()
        now = tp_model.full_state_dict()
        found[f"loaded {source}"] = bad(errors(now, expected), 1e-300)
        found[f"keys {source}"] = [*outcome.missing_keys, *outcome.unexpected_keys]
    first = next(iter(own))
    try:
        tp_model.load_state_dict({**own, first: own[first][:-1]})
    except RuntimeError as refused:
        found["refused"] = first in str(refused)
    with torch.no_grad(), exactly(torch.float64):
        expected = loss_of(model(**batch))
    found["loss"] = error(loss_of(tp_model(**batch)).detach(), expected)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("gpt2", {}),
        ("gpt2", {"transformer.h.0.attn": 2, "transformer.wte": 2}),
        ("llama-kv2", {}),
    ],
)
def test_state_dicts(four: Ranks, name: str, degrees: dict[str, int]) -> None:
    """Names, shapes and values are the model's: fused QKV, odd vocabulary, tied weights."""
    for rank, found in enumerate(four(state, name, 4, degrees)):
        assert found.pop("loss") < TOLERANCE
        assert found.pop("split") == ([1, 2, 4] if degrees else [1, 4])
        streamed = found.pop("streamed")
        assert bool(streamed) == (rank == 0)
        for what, value in found.items():
            assert value in (True, {}, []), what


def ties(name: str) -> dict[str, Any]:
    """Which of the model's names share one parameter, before and after."""

    def groups(module: nn.Module) -> list[list[str]]:
        by_tensor: dict[int, list[str]] = {}
        for path, parameter in module.named_parameters(remove_duplicate=False):
            by_tensor.setdefault(id(parameter), []).append(path)
        return sorted(paths for paths in by_tensor.values() if len(paths) > 1)

    model, batch = sample(name)
    tp_model = split(model, 2, batch)
    found = {"model": groups(model), "split": groups(tp_model)}
    tp_model.load_state_dict(tp_model.state_dict())
    tp_model.to(torch.bfloat16)
    found["later"] = groups(tp_model)
    return found


@pytest.mark.slow
def test_tied_weights_stay_one_parameter(two: Ranks) -> None:
    """Also after loading and converting; the optimizer sees them once."""
    for name, expected in (("gpt2", 1), ("t5", 1)):
        for found in two(ties, name):
            assert len(found["model"]) == expected
            assert found["model"] == found["split"] == found["later"]


# Logits


def logits() -> dict[str, Any]:
    """How the logits leave, by mode and by request."""
    model, batch = sample("gpt2")
    vocabulary = model.config.vocab_size
    with exactly(torch.float64):
        expected = model(**batch).logits
    found: dict[str, Any] = {}
    with exact():
        for how in ("auto", "whole", "sharded"):
            tp_model = split(model, 2, batch, logits=how)
            for kind, inputs in (("loss", batch), ("no loss", {"input_ids": batch["input_ids"]})):
                for training in (True, False):
                    tp_model.train(training)
                    value = tp_model(**inputs).logits
                    split_ = isinstance(value, DTensor)
                    if split_:
                        assert value.placements == (Shard(2),)
                        assert value.device_mesh.ndim == 1
                        assert value.to_local().shape[2] in (vocabulary // 2, vocabulary // 2 + 1)
                    assert value.shape == (*batch["input_ids"].shape, vocabulary)
                    key = f"{how}, {kind}, {'train' if training else 'eval'}"
                    found[key] = (split_, error(whole(value), expected))
    return found


@pytest.mark.slow
def test_how_logits_leave(two: Ranks) -> None:
    """auto: a DTensor beside a loss in train mode, whole else; whole and sharded override."""
    for found in two(logits):
        assert all(off < TOLERANCE for _, off in found.values())
        assert {key for key, (split_, _) in found.items() if split_} == {
            "auto, loss, train",
            "sharded, loss, train",
            "sharded, loss, eval",
            "sharded, no loss, train",
            "sharded, no loss, eval",
        }


def loss_outside(name: str, how: str) -> dict[str, float]:
    """A loss that the caller computes, on whole logits or in torch's loss_parallel."""
    model, batch = sample(name)
    labels = torch.randint(203, (30,), generator=torch.Generator().manual_seed(3))
    tp_model = split(model, dist.get_world_size(), batch, logits=how)
    expected = model(**batch)
    F.cross_entropy(expected.flatten(0, 1), labels).backward()
    found = tp_model(**batch)
    if how == "sharded":
        with loss_parallel():
            F.cross_entropy(found.flatten(0, 1), labels).backward()
    else:
        F.cross_entropy(found.flatten(0, 1), labels).backward()
    return {
        **output_errors(whole(found), expected),
        **errors(whole_gradients(tp_model), gradients(model)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sharded", "whole"])
def test_a_loss_outside(two: Ranks, how: str) -> None:
    """Gradients are the model's where the loss is no part of it, gathered or in loss_parallel."""
    for found in two(loss_outside, "logits-only", how):
        assert bad(found) == {}


def logits_used_twice() -> dict[str, float]:
    """A term on the logits beside the model's own loss."""
    model, batch = sample("gpt2")
    tp_model = split(model, 4, batch, {"transformer.wte": 2})
    with exactly(torch.float64):
        expected = model(**batch)
        (expected.loss + expected.logits.square().mean()).backward()
    found = tp_model(**batch)
    assert isinstance(found.logits, DTensor) and found.logits.placements == (Shard(2),)
    (found.loss + found.logits.full_tensor().square().mean()).backward()
    return errors(whole_gradients(tp_model), gradients(model))


@pytest.mark.slow
def test_logits_gathered_by_the_caller(four: Ranks) -> None:
    """A split output can be gathered and used in another loss, also beyond a region's degree."""
    for found in four(logits_used_twice):
        assert bad(found) == {}


# Ranks


def from_other_seeds(world_tp: int) -> dict[str, Any]:
    """Every rank builds the model from a seed of its own."""
    first, batch = sample("nanogpt")
    model, _ = sample("nanogpt", seed=dist.get_rank())
    tp_model = split(model, world_tp, batch)
    return {
        "first": bad(errors(tp_model.full_state_dict(), first.state_dict()), 1e-300),
        **bad(step_errors(first, tp_model, batch)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4])
def test_the_first_rank_has_the_weights(four: Ranks, tp: int) -> None:
    """Models built from different seeds agree, over replicas too: the first rank's weights win."""
    for found in four(from_other_seeds, tp):
        assert found == {"first": {}}


def compiled(name: str, tp: int) -> tuple[str, str, list[str]]:
    """The plan's hash and the rank's graph, each as text."""
    torch.manual_seed(dist.get_rank())
    model, batch = sample(name, torch.float32)
    graphs = []
    for _ in range(2):
        tp_model = autoshard.parallelize(model, tp, batch, degree="max")
        graphs.append(str(tp_model.graph) + tp_model.print_readable(print_output=False))
    assert graphs[0] == graphs[1]
    stored = [
        f"{n} {p.placements}"
        for n, p in tp_model.named_parameters()
        if isinstance(p, DTensor) and p.placements != (Replicate(),)
    ]
    return plan_hash(tp_model.plan), graphs[0], stored


@pytest.mark.slow
def test_every_rank_compiles_the_same(four: Ranks) -> None:
    """The plan's hash, the graph and the placements are the same on all ranks."""
    ranks = four(compiled, "llama-kv2", 4)
    assert all(found == ranks[0] for found in ranks)
    assert len(ranks[0][2]) > 4
