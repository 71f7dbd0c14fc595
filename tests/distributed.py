"""Runs a function in N processes on gloo over loopback, and brings back what each returned."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 120.0,
    process_group: bool = True,
) -> list[Any]:
    """`fn(*args)` on every rank of a world of `world` processes; the results by rank.

    `fn` is a function of a module (it is pickled), results are pickled too. The processes have
    torchrun's environment and, with `process_group`, a started gloo group. Raises RuntimeError
    with every failed rank's traceback, TimeoutError after `timeout` seconds; no process outlives
    the call.
    """
    context = mp.get_context("spawn")
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        processes = [
            context.Process(
                target=_rank_main,
                args=(fn, args, rank, world, port, out, process_group),
                daemon=True,
            )
            for rank in range(world)
        ]
        try:
            for process in processes:
                process.start()
            late = _wait(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
        failures = []
        for rank, process in enumerate(processes):
            error = out / f"{rank}.error"
            if error.exists():
                failures.append(f"rank {rank} of {world}:\n{error.read_text()}")
            elif process.exitcode and rank not in late:
                failures.append(f"rank {rank} of {world} exited with {process.exitcode}")
        if failures:
            raise RuntimeError("\n".join(failures))
        if late:
            raise TimeoutError(f"ranks {late} of {world} had not ended after {timeout:g} s")
        return [pickle.loads((out / f"{rank}.result").read_bytes()) for rank in range(world)]


def _wait(processes: list[Any], deadline: float) -> list[int]:
    """Waits for all to end, or one to fail; the ranks that still ran, which are then killed."""
    while any(p.is_alive() for p in processes):
        if any(p.exitcode for p in processes):
            grace = time.monotonic() + 2.0
            while any(p.is_alive() for p in processes) and time.monotonic() < grace:
                time.sleep(0.02)
            break
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return [rank for rank, p in enumerate(processes) if p.is_alive()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world: int,
    port: int,
    out: Path,
    process_group: bool,
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo" if sys.platform == "linux" else "lo0",
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        if process_group:
            dist.init_process_group("gloo")
        result = pickle.dumps(fn(*args))
        (out / f"{rank}.result").write_bytes(result)
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        (out / f"{rank}.error").write_text(traceback.format_exc())
        sys.stdout.flush()
        os._exit(1)
