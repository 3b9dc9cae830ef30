"""Each kernel compiled ahead of time, without a GPU, for each generation that litdeploy is for."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="needs Triton, which is for Linux and Windows only")

from litdeploy.trainer.kernels import augmentation, distillation, scaling, section_loss  # noqa: E402

from .conftest import INTERPRETED  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under the interpreter")

MAPS, SIZES = ("*bf16",) * 3, ("i32",) * 3
LOGITS = {
    "logits_ptr": "*fp32",
    "teacher_ptr": "*fp32",
    "labels_ptr": "*i64",
    "losses_ptr": "*fp32",
    "gradients_ptr": "*fp32",
    "alpha": "fp32",
    "temperature": "fp32",
}


def rows_of(classes: int) -> dict[str, Any]:
    width = triton.next_power_of_2(classes)
    return {**LOGITS, "rows": "i32", "CLASSES": classes, "ROWS": max(1, distillation.TILE // width), "BLOCK": width}


# A kernel and its arguments: types of pointers and numbers, values of constants.
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "scaled": (
        scaling._scale_kernel,
        {
            "kept": MAPS,
            "scaled": MAPS,
            "sizes": SIZES,
            "upstream_ptr": "*fp32",
            "divisors": SIZES,
            "BLOCK": scaling.BLOCK,
        },
    ),
    "section losses": (
        section_loss._difference_kernel,
        {
            "students": MAPS,
            "teachers": MAPS,
            "differences": MAPS,
            "sizes": SIZES,
            "partials_ptr": "*fp32",
            "BLOCK": scaling.BLOCK,
        },
    ),
    "their means": (
        section_loss._mean_kernel,
        {
            "partials_ptr": "*fp32",
            "sizes": SIZES,
            "means_ptr": "*fp32",
            "BLOCK": scaling.BLOCK,
            "PARTIALS": section_loss.PARTIALS,
        },
    ),
    "10 classes": (distillation._rows_kernel, rows_of(10)),
    "1000 classes": (distillation._rows_kernel, rows_of(1000)),
    "4096 classes": (distillation._rows_kernel, rows_of(distillation.MOST_CLASSES)),
    "50257 classes": (distillation._blocks_kernel, {**LOGITS, "CLASSES": 50257, "BLOCK": distillation.BLOCK}),
    "augmented": (
        augmentation._augment_kernel,
        {
            "source_ptr": "*u8",
            "rows_ptr": "*i64",
            "tops_ptr": "*i64",
            "lefts_ptr": "*i64",
            "flips_ptr": "*i1",
            "mean_ptr": "*fp32",
            "std_ptr": "*fp32",
            "batch_ptr": "*bf16",
            "CHANNELS": 3,
            "HEIGHT": 32,
            "WIDTH": 32,
            "PADDING": 4,
            "BLOCK": augmentation.BLOCK,
        },
    ),
}


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def stack(name: str, capability: int, aligned: bool, folder: Path, **options: int) -> int:
    """Bytes of local memory that a thread of the compiled kernel takes: where registers are spilled to.

    Args:
        capability: 80 for sm_80.
        aligned: addresses and sizes are multiples of 16, as they mostly are; loads are wider then.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, arguments = KERNELS[name]
    signature, constants, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        given = arguments[argument]
        if isinstance(given, int):
            signature[argument], constants[(i,)] = "constexpr", given
            continue
        signature[argument] = given
        paths = [(i, j) for j in range(len(given))] if isinstance(given, tuple) else [(i,)]
        if aligned and given != "fp32":
            attributes.update({path: [["tt.divisibility", 16]] for path in paths})
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={**scaling.OPTIONS, **options})
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    told = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    )
    found = re.findall(r"\bSTACK:(\d+) .*\bLOCAL:(\d+)", told.stdout)
    assert len(found) == 1, told.stdout
    return sum(int(size) for size in found[0])


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_no_register_is_spilled(name: str, capability: int, aligned: bool, tmp_path: Path) -> None:
    assert stack(name, capability, aligned, tmp_path) == 0


def test_a_kernel_with_too_few_registers_is_found_to_spill(tmp_path: Path) -> None:
    assert stack("4096 classes", 90, True, tmp_path, maxnreg=24) > 0
