"""A rank that dies or hangs within a step: the others end with an error that says what happened."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import autoshard
from autoshard import failures
from autoshard.errors import CollectiveError
from autoshard.groups import ProcessGroupComm
from autoshard.mesh import Mesh, init_mesh
from tests.distributed import _free_port, _rank_main, run_distributed

TIMEOUT = 10.0  # seconds, of the process groups
ROLL = 3 * failures.GRACE  # seconds more until an error is raised, at most


PLACES = {  # of the lost rank's neighbour, by where the rank is lost
    "inputs": "InputCheck.compare (agreement.py:",
    "forward": "the forward of reduce at layers.0.down (node ",
    "backward": "the backward of copy at layers.1.up (node ",
}


class Block(nn.Module):
    """One MLP with a name to be found in an error, and a place to stop in."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(x)))
        return out


class Stack(nn.Module):
    """Two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def step_with_a_casualty(folder: Path, victim: int, how: str, where: str) -> dict[str, Any]:
    """Steps of which the second loses a rank, in the forward or the backward; what the error says."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    x = torch.randn(3, 8, requires_grad=True)
    compared = where == "inputs"
    tp_model = autoshard.parallelize(Stack(), world, (x,), degree="max", check_inputs=compared)
    tp_model(x).sum().backward()
    dist.barrier()

    def fall(gradient: Any = None) -> None:
        if rank == victim:
            if how == "sleep":
                time.sleep(120)
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)

    start = time.monotonic()
    try:
        if where != "backward":
            fall()
        y = tp_model(x)
        if where == "backward":
            if rank == victim:
                y.register_hook(fall)
            y.sum().backward()
    except CollectiveError as error:
        return {"told": str(error), "missing": error.missing, "seconds": time.monotonic() - start}
    return {"told": "", "missing": (), "seconds": time.monotonic() - start}


def with_a_casualty(world: int, victim: int, how: str, where: str) -> dict[int, dict[str, Any]]:
    """What each other rank found. No process is left, stopped ones included."""
    context = mp.get_context("spawn")
    port = _free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args = (folder, victim, how, where)
        processes = [
            context.Process(
                target=_rank_main,
                args=(step_with_a_casualty, args, rank, world, port, folder, False),
                daemon=True,
            )
            for rank in range(world)
        ]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + 100 + TIMEOUT
            others = [p for rank, p in enumerate(processes) if rank != victim]
            while any(p.is_alive() for p in others) and time.monotonic() < deadline:
                time.sleep(0.05)
            late = [rank for rank, p in enumerate(processes) if p.is_alive() and rank != victim]
        finally:
            for process in processes:
                if process.pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)  # also ends what is stopped
                    process.join()
        errors = [p.read_text() for p in folder.glob("*.error")]
        assert not errors, errors
        assert not late, f"ranks {late} had not ended"
        assert not multiprocessing.active_children()
        return {
            rank: pickle.loads((folder / f"{rank}.result").read_bytes())
            for rank in range(world) if rank != victim
        }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "victim", "how", "where"),
    [
        (2, 1, "kill", "inputs"),
        (2, 1, "kill", "backward"),
        (2, 1, "stop", "forward"),
        (2, 0, "stop", "backward"),  # which keeps the store
        (2, 0, "kill", "forward"),
        (4, 2, "kill", "forward"),
        (4, 1, "stop", "backward"),
    ],
)
def test_a_lost_rank_is_named(world: int, victim: int, how: str, where: str) -> None:
    """Every other rank says which collective of which layer failed, and who does not answer."""
    found = with_a_casualty(world, victim, how, where)
    assert len(found) == world - 1
    for rank, one in found.items():
        assert one["missing"] == (victim,), one
        assert f"rank {victim} does not answer" in one["told"]
        assert PLACES[where] in one["told"]
        assert f"failed on rank {rank}" in one["told"]
        assert one["seconds"] < (0 if how == "kill" and world == 2 else TIMEOUT) + ROLL


@pytest.mark.slow
def test_a_rank_that_is_elsewhere_says_where() -> None:
    """Alive, and not in the collective: the error says what it is doing instead."""
    (found,) = with_a_casualty(2, 1, "sleep", "forward").values()
    assert found["missing"] == ()
    assert (
        "every rank answers: rank 1 is in step_with_a_casualty.<locals>.fall (test_failures.py:"
        in found["told"]
    )


def timeouts() -> list[float]:
    """Seconds of every group of a mesh with dp, tp and factored degrees."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=77))
    mesh = Mesh(init_mesh(4, device="cpu"), [2, 4])
    pair = init_mesh(2, device="cpu")
    assert pair is not None
    groups = [mesh.group(2), mesh.group(4)]
    processes = [g.process_group for g in groups if isinstance(g, ProcessGroupComm)]
    found = [*processes, pair.get_group("dp"), pair.get_group("tp")]
    cpu = torch.device("cpu")
    return [g._get_backend(cpu).options._timeout.total_seconds() for g in found]


@pytest.mark.slow
def test_every_group_has_the_timeout_of_the_default_group() -> None:
    """A mesh gives its groups the backend's 30 minutes else, whatever init_process_group was told."""
    assert run_distributed(timeouts, 4, process_group=False) == [[77.0] * 4] * 4


_ENDS = """
import atexit, threading
import torch.distributed as dist
from autoshard import failures

def ended():
    left = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    print("left:", left, flush=True)

atexit.register(ended)  # runs after what is registered later
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
dist.init_process_group("fake", rank=0, world_size=2, store=store)
failures.answer_roll_calls()
assert any(t.name == "autoshard roll call" for t in threading.enumerate())
"""


def test_no_thread_is_left_when_the_interpreter_ends() -> None:
    """A thread in the store's C++ code at that time would abort the process, with exit code -6."""
    ended = subprocess.run(
        [sys.executable, "-c", _ENDS], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "left: []\n"
