from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from litdeploy.errors import CheckpointError
from litdeploy.storage.checkpoint import read_checkpoint


class _Bytes:
    def __init__(self, count: int) -> None:
        self.count = count

    def __reduce__(self) -> tuple[Any, ...]:
        return (bytearray, (self.count,))


def _sparse() -> torch.Tensor:
    with torch.sparse.check_sparse_tensor_invariants():
        return torch.sparse_coo_tensor([[0]], [1.0], (10**12,))


def _holding_itself() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["model"] = content
    return content


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"a.b": torch.zeros(1, dtype=torch.float16).expand(10**12)},
            "claims .1000000000000,., 2,000,000,000,000 bytes",
        ),
        ({"a.b": torch.zeros(2), "x": _Bytes(10**12)}, "bytearray"),
        (_holding_itself(), "no state dict"),
        ({"a.b": _sparse()}, "sparse"),
        ({"a.b": torch.empty(2, device="meta")}, "no values"),
        ({1: torch.zeros(2)}, "named by a int"),
    ],
)
def test_what_a_pickle_claims_is_not_believed(tmp_path: Path, content: dict[Any, Any], message: str, old: bool) -> None:
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "a.pt")


def test_a_tensor_of_more_elements_than_its_storage_is_refused(tmp_path: Path) -> None:
    """Its pickle says 10**12 elements, in binary, where it said 4096."""
    torch.save({"a.b": torch.zeros(4096)}, tmp_path / "good.pt")
    told, claimed = (
        pickle.BININT2 + (4096).to_bytes(2, "little"),
        pickle.LONG1 + b"\x06" + (10**12).to_bytes(6, "little"),
    )
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "lie.pt", "w") as lie:
        for name in good.namelist():
            lie.writestr(name, good.read(name).replace(told, claimed))
    with pytest.raises(CheckpointError, match=r"claims \(1000000000000,"):
        read_checkpoint(tmp_path / "lie.pt")


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as good,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in good.namelist():
            bomb.writestr(name, good.read(name))
        bomb.writestr("archive/data/bomb", bytes(2**24))
    with pytest.raises(CheckpointError, match="packed, or claims more"):
        read_checkpoint(tmp_path / "bomb.pt")


def _pairs(levels: int) -> bytes:
    """A pickle of a dict whose key is a pair of a pair of a pair …, of 2**levels numbers in 5 bytes a level."""
    nested = b"".join(b"h" + bytes([level]) + b"\x86q" + bytes([level + 1]) for level in range(levels))
    return b"\x80\x02}K\x00\x85q\x00" + nested + b"K\x01s."


@pytest.mark.parametrize("old", [False, True])
def test_a_key_that_takes_ages_to_hash_is_refused(tmp_path: Path, old: bool) -> None:
    assert len(pickle.loads(_pairs(10))) == 1
    path = tmp_path / "a.pt"
    if old:
        head: tuple[Any, ...] = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        path.write_bytes(b"".join(pickle.dumps(each, 2) for each in head) + _pairs(40) + pickle.dumps([], 2))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", _pairs(40))
            archive.writestr("a/version", "3\n")
    with pytest.raises(CheckpointError, match="repeats values within values"):
        read_checkpoint(path)


@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_with_the_same_weights_under_several_names_is_read(tmp_path: Path, old: bool) -> None:
    weights = nn.Sequential(*(nn.Linear(2, 2) for _ in range(50))).state_dict()
    content = {"model": weights, "ema": weights, "best": weights, "history": [(0.1, 0.2)] * 1000}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    assert len(read_checkpoint(tmp_path / "a.pt").weights) == 100
