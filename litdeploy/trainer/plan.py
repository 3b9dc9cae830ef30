"""What a run does besides what its recipe says outright: what is compiled, and which features are kept."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from litdeploy.batch import Batch, forward, size_of
from litdeploy.config.recipe import Choice
from litdeploy.config.spec import Noun
from litdeploy.data import free_memory
from litdeploy.errors import CompilationError, TrainingError
from litdeploy.networks.network import counting
from litdeploy.networks.sections import container, recording, run_section
from litdeploy.trainer.cache import Layout

# Floating-point operations of a whole run from which on compiling saves more time than it takes. On two CPU cores in
# bf16 (benchmarks/results/amd-epyc-2-cores): a teacher takes 5 to 10 s to compile and then saves 0.35 s in 10^12; the
# step of a ResNet-20 takes 47 s and saves 0.3 s in 10^12.
_TEACHER_PAYS = 50e12
_STEP_PAYS = 300e12

# Views that `auto` keeps, and how often it must see each at the least.
AUTO_VIEWS = 4
_AUTO_VISITS = 2


@torch.no_grad()
def forward_flops(module: nn.Module, example: Batch) -> int:
    """Floating-point operations of one image's forward pass; a multiply-add is two. Elementwise work is left out."""
    module = copy.deepcopy(module).eval()
    with counting() as counted:
        forward(module, example)
    return int(counted.get_total_flops()) // size_of(example)


@torch.no_grad()
def section_flops(module: nn.Module, sections: Sequence[str], example: Batch) -> dict[str, int]:
    """Section → floating-point operations of one image's forward pass through it. Counted as by `forward_flops`."""
    module = copy.deepcopy(module).eval()
    with recording(module, sections) as calls:
        forward(module, example)
    found = {}
    for name, call in calls.items():
        with counting() as counted:
            run_section(list(container(module, name)), call.input, call.arguments)
        found[name] = int(counted.get_total_flops()) // size_of(example)
    return {name: found[name] for name in sections}


def compiles_teacher(setting: Choice, flops: float, device: torch.device) -> bool:
    """Whether the teacher is compiled. `flops`: of all its passes of the run. `auto` never does on CUDA: unmeasured."""
    return setting == "on" or (setting == "auto" and device.type == "cpu" and flops >= _TEACHER_PAYS)


def compiles_step(setting: Choice, flops: float, device: torch.device) -> bool:
    """Whether the step is compiled. `flops`: of the phase's steps, forward and backward. See `compiles_teacher`."""
    return setting == "on" or (setting == "auto" and device.type == "cpu" and flops >= _STEP_PAYS)


def fallback(setting: Choice, note: Callable[[str], None]) -> Callable[[str], None]:
    """What happens where compiling fails: it is said, and the function runs as it is.

    Raises:
        CompilationError: by the call, where the user insists on compiling.
    """

    def tell(why: str) -> None:
        if setting == "on":
            raise CompilationError(
                f"--compile on: torch.compile failed ({why}). It needs a C++ compiler (apt-get install g++) and, on "
                "CUDA, Triton (pip install triton). Or train without: --compile off"
            )
        note(f"warning: not compiled, and slower for it: {why}")

    return tell


@dataclass(frozen=True)
class CachePlan:
    """Whether and where features are kept.

    Attributes:
        views: of each image; 0: nothing is kept.
        mapped: in a memory-mapped file, not in the device's memory.
        why: what the user is told.
    """

    views: int
    mapped: bool
    why: str


def plan_cache(
    setting: int | Literal["auto", "off"],
    layout: Layout | None,
    images: int,
    epochs: int,
    device: torch.device,
    folder: Path,
    keep: bool,
    ranks: int = 1,
    auto_views: int = AUTO_VIEWS,
    noun: Noun = "image",
) -> CachePlan:
    """Decides on the feature cache.

    Args:
        setting: how many views, or `auto`: where that pays and there is room.
        layout: None where the features cannot be kept.
        images: that are trained on.
        epochs: in which the teacher is needed.
        folder: where a memory-mapped file would be.
        keep: the user wants it there, for further students.
        ranks: that train; several keep nothing, and `check_recipe` told whoever asked for it.
        auto_views: how many `auto` keeps; one where all are the same.
        noun: what the data call an image.

    Raises:
        TrainingError: the user asked for so many views, and they cannot be kept or there is no room for them.
    """
    if setting == "off":
        return CachePlan(0, False, "feature cache: off")
    if ranks > 1:
        return CachePlan(0, False, f"feature cache: none; it is not kept by several ranks, and there are {ranks}")
    if layout is None:
        why = "what the teacher makes depends on more than the image (a domain, an attention mask), which is not kept"
        if setting == "auto":
            return CachePlan(0, False, f"feature cache: none; {why}")
        raise TrainingError(f"--feature-cache {setting}: {why}. Train without: --feature-cache off")
    views = auto_views if setting == "auto" else setting
    size = layout.bytes(views, images)
    what = f"{views} view{'s' * (views > 1)} of {images:,} {noun}s, {size / 1e9:.2g} GB"
    if setting == "auto" and not keep and epochs < _AUTO_VISITS * views:
        return CachePlan(0, False, f"feature cache: none; {what} would be seen less than twice in {epochs} epochs")
    does = f"the teacher runs in {min(views, epochs)} of {epochs} epochs"
    # Half of what is free: the other half is for the training itself.
    memory, disk = free_memory(device) // 2, _free_on_disk(folder) // 2
    if size <= memory and not keep:
        return CachePlan(views, False, f"feature cache: {what} in memory; {does}")
    # From a disk features may come slower than a teacher makes them. By itself a file is chosen only where the
    # system's cache of files can hold all of it, and beside a CPU's teacher, which is the slower one.
    swift = device.type == "cpu" and size <= 2 * memory
    if size <= disk and (keep or setting != "auto" or swift):
        return CachePlan(views, True, f"feature cache: {what} in {folder}; {does}")
    room = f"{memory / 1e9:.2g} GB of memory and {disk / 1e9:.2g} GB of disk may be used for it"
    if setting == "auto":
        return CachePlan(0, False, f"feature cache: none; {what} do not fit, {room}")
    raise TrainingError(
        f"--feature-cache {setting}: {what} do not fit; {room}. Keep fewer views, or none: --feature-cache off"
    )


def _free_on_disk(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
