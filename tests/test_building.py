"""A rank that builds a large model holds its share of it, and not much more while it is filled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "building.py"
SLACK = 48 * 2**20  # graphs, and what the allocator keeps


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_building_small(tmp_path: Path) -> None:
    """The benchmark runs; peaks are a share, and one whole parameter more where they are drawn."""
    command = [sys.executable, str(BENCHMARK), "--small", "--json", str(tmp_path / "found.json")]
    environment = {"PYTHONPATH": str(BENCHMARK.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("51,500,032 parameters, 196 MiB in float32")
    ranks = json.loads((tmp_path / "found.json").read_text())
    assert [found["rank"] for found in ranks] == [0, 1]
    for found in ranks:
        share, largest, stages = found["share"], found["largest"], found["stages"]
        assert found["whole"] > share + largest / 2 + SLACK  # the bounds tell a share from the whole
        assert stages["parallelize"]["peak"] < SLACK
        assert stages["load_weights"]["peak"] < share + SLACK
        assert stages["init_weights"]["peak"] < share + largest + SLACK
        assert stages["init_weights"]["held"] < share + SLACK
