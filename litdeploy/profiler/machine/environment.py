"""Where it was measured."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

import litdeploy
from litdeploy.profiler.schema import Environment
from litdeploy.runtime import device_name

# Distributions by the name that they are installed under; of each line the first that is there.
_LIBRARIES = {
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "numpy": ("numpy",),
}


def look_around(device: torch.device) -> Environment:
    """Records the machine as it is now."""
    return Environment(
        device=str(device),
        device_name=device_name(device),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        system=platform.platform(),
        python=platform.python_version(),
        litdeploy=litdeploy.__version__,
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def versions() -> dict[str, str]:
    """Versions of the libraries that a time depends on, as installed; none of them is imported for it."""
    found = {}
    for library, distributions in _LIBRARIES.items():
        for distribution in distributions:
            try:
                found[library] = version(distribution)
                break
            except PackageNotFoundError:
                continue
    return found
