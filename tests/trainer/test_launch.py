from __future__ import annotations

import pytest
import torch

from litdeploy.errors import DeviceError, TrainingError
from litdeploy.trainer.launch import Launch, launched


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch()),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Launch(3, 4, 1)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}, Launch(1, 2, 0)),
        (
            {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
            Launch(0, 8, 0),
        ),
        ({"WORLD_SIZE": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Launch()),
    ],
    ids=["alone", "torchrun", "srun", "torchrun under srun", "alone in a job of four tasks"],
)
def test_how_a_process_was_started(variables: dict[str, str], expected: Launch) -> None:
    assert launched(variables) == expected


def test_incomplete_variables_are_named() -> None:
    with pytest.raises(TrainingError, match=r"RANK=, WORLD_SIZE=2, LOCAL_RANK=.*export WORLD_SIZE=1"):
        launched({"WORLD_SIZE": "2"})


def test_where_to_meet_must_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(TrainingError, match="MASTER_ADDR"):
        Launch(0, 2).join(torch.device("cpu"))


@pytest.mark.gpu
def test_more_ranks_than_devices_are_refused() -> None:
    count = torch.cuda.device_count()
    assert Launch(0, count + 1, 0).device("cuda") == torch.device("cuda", 0)
    with pytest.raises(DeviceError, match=f"--nproc-per-node {count}"):
        Launch(count, count + 1, count).device("cuda")
