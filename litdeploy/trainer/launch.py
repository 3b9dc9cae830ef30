"""How this process was started: alone, or by a launcher with others, whom it meets."""

from __future__ import annotations

import atexit
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch

from litdeploy.errors import DeviceError, TrainingError
from litdeploy.runtime import resolve_device
from litdeploy.trainer.parallel import ALONE, Ranks, reason_of

# For one exchange: the first rank evaluates meanwhile. Not how long a dead rank is waited for, whose connections close.
_TIMEOUT = timedelta(minutes=30)

# (rank, number of ranks, rank on its own machine): torchrun's names, which other launchers took over, and srun's.
_VARIABLES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        rank, size: see `Ranks`.
        local_rank: which of its machine's ranks it is.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def device(self, text: str) -> torch.device:
        """The device of this rank: as `runtime.resolve_device`, but of several CUDA devices each rank takes its own.

        Raises:
            DeviceError: it is not there.
        """
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.size == 1 or not count or text not in {"auto", "cuda"}:
            return resolve_device(text)
        if self.local_rank >= count:
            raise DeviceError(
                f"--device {text}: rank {self.rank} is number {self.local_rank + 1} on its machine, which has {count} "
                f"CUDA device{'s' * (count > 1)}. Start one process a device (torchrun --nproc-per-node {count}), or "
                "give --device cuda:0 where the launcher shows each process only its own device, or --device cpu."
            )
        return torch.device("cuda", self.local_rank)

    def join(self, device: torch.device) -> Ranks:
        """Meets the other ranks, once a process; they exchange by gloo, and what is on CUDA by NCCL.

        Raises:
            TrainingError: they cannot be met.
        """
        if self.size == 1:
            return ALONE
        import torch.distributed as dist

        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
            if missing:
                raise TrainingError(
                    f"{' and '.join(missing)} not set: where {self.size} processes meet is missing. torchrun sets it; "
                    'under srun: export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) '
                    "MASTER_PORT=29500. For one process alone: export WORLD_SIZE=1"
                )
            # torch's optimisers import it. Imported after the ranks met, it holds on to their group (torch 2.13, seen),
            # whose threads then outlive `destroy_process_group` and can abort the process as it exits.
            importlib.import_module("torch._dynamo")
            try:
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                    init_method="env://",
                    timeout=_TIMEOUT,
                    rank=self.rank,
                    world_size=self.size,
                )
            except (RuntimeError, ValueError) as error:
                raise TrainingError(
                    f"rank {self.rank} of {self.size} could not meet the others at {os.environ['MASTER_ADDR']}:"
                    f"{os.environ['MASTER_PORT']} ({reason_of(error)}). Were all of them started, and can "
                    "their machines reach that address? Another port: export MASTER_PORT=29501"
                ) from error
            atexit.register(dist.destroy_process_group)
        return Ranks(self.rank, self.size)


def launched(variables: Mapping[str, str] = os.environ) -> Launch:
    """Reads how this process was started from the launcher's variables: torchrun's or, where they are missing, srun's.

    Raises:
        TrainingError: they are incomplete, or no numbers.
    """
    for names in _VARIABLES:
        size = names[1]
        if size not in variables:
            continue
        if variables[size] == "1":
            return Launch()
        try:
            rank, ranks, local_rank = (int(variables[name]) for name in names)
        except (KeyError, ValueError):
            found = ", ".join(f"{name}={variables.get(name, '')}" for name in names)
            raise TrainingError(
                f"a launcher says that this is one of several processes, and not which ({found}). Each needs these as "
                f"whole numbers; for one process alone: export {_VARIABLES[0][1]}=1"
            ) from None
        return Launch(rank, ranks, local_rank)
    return Launch()
