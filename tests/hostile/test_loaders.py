"""Mutated files of every kind, drawn by hypothesis: each loads, or is refused by litdeploy's own error."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

# Not on the machines that run only what is marked `gpu`.
pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import make, place
from benchmarks.loaders import KINDS, canary_module, draw
from benchmarks.mutations import CANARY_FILE
from litdeploy.errors import LitdeployError

_SLOW = {
    "csv",
    "parquet",
    "json lines",
    "onnx",
    "recipe",
    "target",
    "checkpoint, old format",
    "bundle",
    "bundle of a generator",
    "exports",
    "sentence embedder",
    "metrics",
    "report",
}


@pytest.fixture
def _offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    canary_module(tmp_path)


@pytest.mark.usefixtures("_offline_cache")
@pytest.mark.parametrize("name", KINDS)
def test_a_mutated_file_loads_or_is_refused_and_runs_no_code(name: str, tmp_path: Path) -> None:
    kind, folder = KINDS[name], tmp_path / "input"
    files = make(kind, tmp_path / "made")
    place(files, folder)
    kind.load(folder)

    @settings(
        max_examples=15 if name in _SLOW else 40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32))
    def mutated(seed: int) -> None:
        place(draw(kind, files, Random(seed)), folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the libraries tell of damaged files
            with suppress(LitdeployError):
                kind.load(folder)

    mutated()
    assert not list(tmp_path.rglob(CANARY_FILE))
    assert not Path("/canary").exists()
