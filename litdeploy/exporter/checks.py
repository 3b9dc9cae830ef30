"""Whether an export can be had as it was asked for: the precisions, the device, the GPU, and who builds engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch

from litdeploy.config.target import Target
from litdeploy.errors import SettingsError
from litdeploy.exporter.forms import FORMS, Options
from litdeploy.exporter.tensorrt_choice import Choice, choose_library
from litdeploy.runtime import resolve_device
from litdeploy.runtime.engine import HardwareCompatibility

_IO_PRECISIONS = ("fp32", "fp16", "bf16")


def check_precisions(
    forms: Sequence[str],
    precisions: Sequence[str],
    io_precision: str,
    target: Target,
    named: Target | str | None,
) -> None:
    """Whether each form and the target have each precision.

    Args:
        named: the target as the user gave it.

    Raises:
        SettingsError: one of them lacks one; or there is none to export in.
    """
    if not precisions:
        raise SettingsError("nothing to export: no precision was given. Write --precision fp32.")
    for precision in precisions:
        if precision not in FORMS["onnx"].precisions:
            raise SettingsError(
                f"--precision {precision}: no such precision. Write one or more of "
                f"{', '.join(FORMS['onnx'].precisions)}, as in --precision fp32,fp16."
            )
        if precision not in target.precisions:
            gpu = f" (compute capability {target.compute_capability})" if target.compute_capability else ""
            raise SettingsError(
                f"--precision {precision}: the target{f' {named}' if isinstance(named, str) else ''}{gpu} lacks it. "
                f"It has {', '.join(target.precisions)}."
            )
        for form in forms:
            if precision not in FORMS[form].precisions:
                raise SettingsError(
                    f"--{form} has no {precision}; it has {', '.join(FORMS[form].precisions)}. Export {precision} "
                    f"apart: litdeploy export --onnx --precision {precision}"
                )
    if io_precision not in _IO_PRECISIONS:
        raise SettingsError(f"--io-precision {io_precision}: images and logits are {', '.join(_IO_PRECISIONS)}.")


def device_for(forms: Sequence[str], target: Target) -> torch.device:
    """Where the files are made and run; without a GPU the CPU, where only engines are built: those are ahead of time.

    Raises:
        DeviceError: the target's is not there.
    """
    if list(forms) == ["trt"] and not torch.cuda.is_available():
        return torch.device("cpu")
    return resolve_device(target.device)


def choice_for(trt: bool, options: Options, device: torch.device) -> Choice | None:
    """Which TensorRT builds; None where no engine was asked for.

    Raises:
        SettingsError: options of engines without engines, or such as are none.
        DependencyError: no library is there that builds.
    """
    level, known = options.hardware_compatibility, get_args(HardwareCompatibility)
    if level not in known:
        raise SettingsError(f"--hardware-compatibility {level}: no such one. Write {', '.join(known)}.")
    if trt:
        return choose_library(device, options.compute_capabilities)
    given = {
        "--compute-capability": options.compute_capabilities,
        "--version-compatible": options.version_compatible,
        "--hardware-compatibility": level != "none",
    }
    for option, value in given.items():
        if value:
            raise SettingsError(
                f"{option} is for TensorRT engines, and none was asked for. Add --trt, or leave it out."
            )
    return None


def check_gpu(target: Target, device: torch.device) -> None:
    """A package is compiled for the GPU at hand.

    Raises:
        SettingsError: it is not the target's.
    """
    if target.compute_capability is None or device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if target.compute_capability != f"{major}.{minor}":
        raise SettingsError(
            f"--aoti compiles for the GPU at hand, {torch.cuda.get_device_name(device)} (compute capability "
            f"{major}.{minor}), and the target has {target.compute_capability}. Run it on such a GPU, or export --onnx."
        )
