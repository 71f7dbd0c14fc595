"""Rank processes that stay: each holds a pair, and each hashes strings with a seed of its own.

The iteration order of sets of strings differs among them, as it does among a user's processes.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from autoshard import AutoshardError
from tests.distributed import _free_port
from tests.fuzz.counts import is_refusal
from tests.fuzz.laws import Broken, law
from tests.fuzz.pair import Pair

TIMEOUT = 400.0  # seconds for a move


class Refused(AutoshardError):
    """What all ranks refused alike."""


class Ranks:
    """A world of processes on gloo; started when first asked for, and anew after a failure."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.ends: list[Connection] = []
        self.processes: list[Any] = []

    def start(self) -> None:
        """Start the processes."""
        context, port = mp.get_context("spawn"), _free_port()
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            with environment(PYTHONHASHSEED=str(rank + 1), OMP_NUM_THREADS="1"):
                process = context.Process(
                    target=main, args=(theirs, rank, self.world, port), daemon=True
                )
                process.start()
            theirs.close()
            self.ends.append(mine)
            self.processes.append(process)

    def stop(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.ends, self.processes = [], []

    def call(self, move: str, *args: Any) -> Any:
        """One move on every rank; its result, which is the same on all of them.

        Raises:
            Refused: all ranks refuse it, in the same words.
            Broken: a law does not hold, or ranks disagree.
        """
        if not self.processes:
            self.start()
        try:
            for end in self.ends:
                end.send((move, args))
            answers = []
            for rank, end in enumerate(self.ends):
                law(end.poll(TIMEOUT), f"rank {rank} does not answer {move}{args}")
                answers.append(end.recv())
            kinds = {kind for kind, _ in answers}
            law(kinds <= {"made"} or kinds <= {"refused"}, "\n".join(f"{k}: {v}" for k, v in answers))
            law(answers[:1] * self.world == answers, f"the same on every rank: {move}{args}: {answers}")
        except (Broken, EOFError, OSError) as error:
            self.stop()
            raise Broken(f"on {self.world} rank processes: {error}") from None
        kind, result = answers[0]
        if kind == "refused":
            raise Refused(result)
        return result


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for the processes that are started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def main(end: Connection, rank: int, world: int, port: int) -> None:
    """A rank: one move after the other, until the other side is gone."""
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    dist.init_process_group("gloo", timeout=timedelta(seconds=180))
    pair: Pair | None = None
    with contextlib.suppress(EOFError):
        while True:
            move, args = end.recv()
            try:
                if move == "begin":
                    torch.manual_seed(0)
                    pair = Pair(*args)
                    end.send(("made", pair.begin()))
                else:
                    end.send(("made", getattr(pair, move)(*args)))
            except BaseException as error:
                if is_refusal(error):
                    end.send(("refused", f"{type(error).__name__}: {error}"))
                else:
                    end.send(("raised", traceback.format_exc()))
