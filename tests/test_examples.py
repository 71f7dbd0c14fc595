"""The examples run on two processes, and print losses that go down."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import _free_port

ROOT = Path(__file__).parents[1]
# These are commands with options and a size of their own.
COMMANDS = {"demo.py", "train_two_gpus.py"}
EXAMPLES = sorted(p.name for p in (ROOT / "examples").glob("*.py") if p.name not in COMMANDS)


def on_two_processes(script: str, folder: Path, timeout: float = 240.0) -> tuple[str, str]:
    """What each of two processes of the script prints, in torchrun's environment, over loopback."""
    shared = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    running = []
    try:
        for rank in range(2):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
            with (folder / f"{rank}.out").open("w") as out:
                command = [sys.executable, str(ROOT / "examples" / script)]
                running.append(
                    subprocess.Popen(command, env=own, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
                )
        deadline = time.monotonic() + timeout
        while any(p.poll() is None for p in running) and time.monotonic() < deadline:
            if any(p.poll() for p in running):
                break
            time.sleep(0.05)
        codes = [p.poll() for p in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    texts = [(folder / f"{rank}.out").read_text() for rank in range(2)]
    assert codes == [0, 0], f"{script} ended with {codes}:\n{texts[0][-3000:]}\n{texts[1][-3000:]}"
    return texts[0], texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES)
def test_example(script: str, tmp_path: Path) -> None:
    """Ends well on both ranks; losses are printed by one of them."""
    first, second = on_two_processes(script, tmp_path)
    number = r"(?i)loss\D{0,12}(\d+\.\d+)"
    losses = [float(x) for x in re.findall(number, first)]
    if losses:
        assert len(losses) > 1 and losses[-1] < losses[0], first
    assert not re.findall(number, second), second


def test_examples_are_short() -> None:
    """Each can be read in a minute."""
    for name in EXAMPLES:
        assert len((ROOT / "examples" / name).read_text().splitlines()) <= 75, name
