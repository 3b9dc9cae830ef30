"""The kernels' tests on the CPU. In a process of their own: Triton reads TRITON_INTERPRET when it is imported, and
whatever else this process compiles with Triton shall be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = ("section_loss", "distillation", "augmentation")


@pytest.mark.slow
def test_the_kernels_tests_pass_under_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="needs Triton, which is for Linux and Windows only")
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *(f"{HERE}/test_{name}.py" for name in KERNELS),
        ],
        cwd=HERE.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "skipped" not in ran.stdout, ran.stdout
