from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from litdeploy.errors import BundleError, SettingsError
from litdeploy.trainer.identity import differences
from litdeploy.trainer.resume import Checkpoints, Every, Snapshot, same_bits

IDENTITY = {"recipe": {"seed": 0, "main": {"epochs": 3}}, "data": "abc"}


def saved(value: float) -> Snapshot:
    return Snapshot({"a": torch.full((3,), value), "b": torch.tensor(7)}, {"position": {"step": int(value)}})


def checkpoints(folder: Path, notes: list[str] | None = None, **identity: Any) -> Checkpoints:
    told = [] if notes is None else notes
    return Checkpoints(folder, {**IDENTITY, **identity}, Every(), told.append)


def names(folder: Path) -> list[str]:
    return sorted(path.name[:24] for path in folder.iterdir())


def test_the_newest_is_read_and_two_are_kept(tmp_path: Path) -> None:
    place = checkpoints(tmp_path / "checkpoints")
    assert place.newest() is None
    for epochs, step in ((0, 5), (0, 12), (1, 0)):
        place.write(epochs, step, saved(step))
    assert names(tmp_path / "checkpoints") == ["epoch-00000-step-0000012", "epoch-00001-step-0000000"]
    found = checkpoints(tmp_path / "checkpoints").newest()
    assert found is not None
    assert found.facts["position"] == {"step": 0}
    assert torch.equal(found.tensors["a"], torch.zeros(3))
    assert found.tensors["b"].shape == ()
    place.clear()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("harm", ["torn", "altered", "emptied", "renamed"])
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path: Path, harm: str) -> None:
    place = checkpoints(tmp_path)
    for step in (1, 2):
        place.write(0, step, saved(step))
    newest = max(tmp_path.iterdir())
    content = newest.read_bytes()
    if harm == "altered":
        newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "renamed":
        newest.replace(tmp_path / min(tmp_path.iterdir()).name.replace("0000001", "0000003"))
    else:
        newest.write_bytes(content[: len(content) // 2] if harm == "torn" else b"")
    notes: list[str] = []
    again = checkpoints(tmp_path, notes)
    if harm == "renamed":
        newest = max(tmp_path.iterdir())
    found = again.newest()
    assert found is not None
    assert found.facts["position"] == {"step": 1}
    assert len(notes) == 1
    assert newest.name in notes[0]
    again.write(0, 2, saved(2))  # what was damaged goes with the next
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoints(tmp_path, notes).newest() is not None
    assert len(notes) == 1


def test_where_none_is_whole_nothing_is_begun_silently(tmp_path: Path) -> None:
    place = checkpoints(tmp_path)
    place.write(0, 1, saved(1))
    next(tmp_path.iterdir()).write_bytes(b"")
    with pytest.raises(BundleError, match=r"none of the checkpoints is intact.*--overwrite"):
        checkpoints(tmp_path).newest()


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    checkpoints(tmp_path).write(0, 1, saved(1))
    other = checkpoints(tmp_path, recipe={"seed": 1, "main": {"epochs": 3}}, data="xyz")
    with pytest.raises(BundleError) as told:
        other.newest()
    assert 'data: "abc" there, "xyz" here' in str(told.value)
    assert "recipe.seed: 0 there, 1 here" in str(told.value)
    assert "main" not in str(told.value)


def test_whoever_forges_a_name_is_not_believed(tmp_path: Path) -> None:
    """A file whose name is its hash is whole; that it is a checkpoint of this run is another matter."""
    import hashlib

    from safetensors.torch import save

    content = save({"a": torch.zeros(1)}, {"litdeploy-run": json.dumps(["no", "facts"])})
    (tmp_path / f"epoch-00000-step-0000001-{hashlib.sha256(content).hexdigest()}.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match="none of the checkpoints is intact"):
        checkpoints(tmp_path).newest()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10min", Every(600.0)),
        ("30s,500steps", Every(30.0, 500)),
        ("1epoch", Every(None, None, 1)),
        ("2h, 1step, 3epochs", Every(7200.0, 1, 3)),
        ("1.5h", Every(5400.0)),
        ("off", Every()),
    ],
)
def test_how_often_is_read(text: str, expected: Every) -> None:
    assert Every.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "10", "10 minutes", "0s", "-1s", "1.5epochs", "1min,2min", "on", "1s,", "1h30min"]
)
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--checkpoint-every .*10min"):
        Every.parse(text)


def test_what_is_due(tmp_path: Path) -> None:
    place = Checkpoints(tmp_path, {}, Every.parse("2epochs,5steps"), print)
    assert not place.due(1, 4)
    assert place.due(2, 4)
    assert place.due(0, 5)
    place.begin(2, 4)
    assert not place.due(3, 8)
    assert place.due(3, 9)
    assert Checkpoints(tmp_path, {}, Every(0.0), print).due(0, 0)
    assert not Checkpoints(tmp_path, {}, Every(), print).due(10**6, 10**9)


def test_differences_are_lines() -> None:
    assert differences({"a": {"b": 1}, "c": [1]}, {"a": {"b": 1}, "c": [1]}) == []
    assert differences({"a": {"b": 1}}, {"a": {"b": 2, "d": 3}}) == ["a.b: 1 there, 2 here", "a.d: null there, 3 here"]


def test_same_bits() -> None:
    nan = torch.tensor([float("nan"), -0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.tensor([0.0]), None)
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
