"""The fuzzer sees what it is there to see."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks.fuzz import opened
from benchmarks.mutations import CANARY_FILE, Canary, mutate
from litdeploy.errors import DataError


def _refuse(folder: Path) -> None:
    raise DataError("no images")


def _fail(folder: Path) -> None:
    raise KeyError("shape")


def _run_code(folder: Path) -> None:
    pickle.loads(pickle.dumps(Canary()))
    raise DataError("and then refused")


def _load(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("load", "result", "detail"),
    [
        (_load, "loaded", ""),
        (_refuse, "DataError", ""),
        (_fail, "finding", "KeyError"),
        (_run_code, "finding", "CANARY"),
    ],
)
def test_an_outcome_is_told_as_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[Path], None], result: str, detail: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found: tuple[Any, ...] = opened("kind", 0, load, tmp_path)
    assert found[2] == result
    assert found[3].startswith(detail)
    assert not (tmp_path / CANARY_FILE).exists()


@pytest.mark.parametrize("name", ["a.pt", "a.th", "a.safetensors", "a.json", "a.jsonl", "a.yaml", "a.csv", "a.png"])
def test_the_same_seed_gives_the_same_mutation_of_whatever_content(name: str) -> None:
    for content in (b"", b'{"a": [1, {"b": "c"}]}\n', bytes(range(256)) * 8):
        changed = [mutate(Random(seed), content, b"other", name) for seed in range(40)]
        assert changed == [mutate(Random(seed), content, b"other", name) for seed in range(40)]
        assert sum(each != content for each in changed) >= (20 if content else 0)
