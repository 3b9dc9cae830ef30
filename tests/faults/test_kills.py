"""Runs and exports killed at random moments: see `benchmarks.faults`, which does it at length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("LITDEPLOY_KILLS", "20"))


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="benchmarks/ is not part of a source distribution")
def test_what_is_killed_goes_on_bit_equal(tmp_path: Path) -> None:
    out = tmp_path / "kills.json"
    command = [sys.executable, "-m", "benchmarks.faults", "--kills", str(KILLS), "--export-share", "0.1"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["kills"] >= KILLS
    assert found["of_exports"] >= 2
    assert found["failures"] == []
