"""`litdeploy export`: from a bundle to artefacts that other people's servers load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import litdeploy
from litdeploy.cli import options as o
from litdeploy.cli.console import note, output, print_json
from litdeploy.cli.recipe_options import recipe_options
from litdeploy.errors import SettingsError

if TYPE_CHECKING:
    from litdeploy.config.target import Precision
    from litdeploy.runtime.engine import HardwareCompatibility
    from litdeploy.storage.records import Artefact


@recipe_options({"data", "network"})
def command(
    bundle: o.BundlePath = o.DEFAULT_BUNDLE,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX: student.onnx, student.fp16.onnx, …")] = False,
    aoti: Annotated[
        bool, typer.Option("--aoti", help="Write an AOTInductor package (student.pt2) for the device at hand.")
    ] = False,
    trt: Annotated[
        bool,
        typer.Option(
            "--trt", help="Build a TensorRT engine (student.engine); without a GPU, ahead of time for others."
        ),
    ] = False,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, bf16, int8, or several of them.", metavar="NAME,…")
    ] = "fp32",
    io_precision: Annotated[str, typer.Option(help="Of images and logits: fp32, fp16 or bf16.")] = "fp32",
    embed_preprocessing: Annotated[
        bool, typer.Option("--embed-preprocessing", help="Take pixels, uint8 (N, H, W, C), and normalise them inside.")
    ] = False,
    calibration_images: Annotated[
        int, typer.Option(help="Training images on which fp16, bf16 and int8 measure activations.", min=1)
    ] = 512,
    compute_capability: Annotated[
        str | None,
        typer.Option(help="Of the GPUs that engines are for, as in 8.6,8.9,12.0; else the target's.", metavar="N.N,…"),
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Engines for later versions of the same major number too.")
    ] = False,
    hardware_compatibility: Annotated[
        str,
        typer.Option(
            help="Engines for other GPUs than the one that builds.", metavar="none|ampere-plus|same-compute-capability"
        ),
    ] = "none",
    triton_repository: Annotated[
        Path | None, typer.Option(help="Also write a model repository for Triton Inference Server.", metavar="DIR")
    ] = None,
    target: o.TargetName = None,
    json: o.Json = False,
    **given: Any,
) -> None:
    """Export the student, and verify that each file computes the same."""
    if not onnx and not aoti and not trt:
        raise SettingsError("say what to export: --onnx, --aoti, --trt")
    manifest = litdeploy.export(
        bundle,
        onnx=onnx,
        aoti=aoti,
        trt=trt,
        # Words that are none are refused by `export`.
        precisions=cast("list[Precision]", o.words(precision)),
        io_precision=cast("Precision", io_precision),
        embed_preprocessing=embed_preprocessing,
        calibration_images=calibration_images,
        compute_capabilities=() if compute_capability is None else o.words(compute_capability),
        version_compatible=version_compatible,
        hardware_compatibility=cast("HardwareCompatibility", hardware_compatibility),
        triton_repository=triton_repository,
        target=target,
        progress=note,
        **given,
    )
    if json:
        print_json({kind: artefact.model_dump(mode="json") for kind, artefact in manifest.artefacts.items()})
        return
    for artefact in manifest.artefacts.values():
        show(artefact)
    note(f"Next: litdeploy profile{'' if bundle == o.DEFAULT_BUNDLE else f' {bundle}'}")


def show(artefact: Artefact) -> None:
    """Prints an exported file, what became of its precision, and how it was held against PyTorch."""
    from litdeploy.runtime.engine import Precisions
    from litdeploy.storage.records import Parity

    details = artefact.details
    opset = f"opset {details['opset']}   " if "opset" in details else ""
    output.print(f"{artefact.path}   {opset}{artefact.precision}   {details['bytes']:,} bytes", highlight=False)
    if "largest_activation" in details:
        largest, kept = details["largest_activation"], details["kept_in_fp32"]
        output.print(
            f"  largest activation {largest['value']:.4g} (in {largest['layer'] or 'the network itself'}); "
            f"kept in fp32: {', '.join(name or 'the network itself' for name in kept) or 'nothing'}",
            highlight=False,
        )
    if "latency" in details:
        fp32_ms, int8_ms = details["latency"]["fp32_ms"], details["latency"]["int8_ms"]
        output.print(
            f"  a call of batch {details['latency']['batch_size']}: {int8_ms:.2f} ms, in fp32 {fp32_ms:.2f} ms"
            + ("  ← int8 is slower than fp32 here" if int8_ms > fp32_ms else ""),
            highlight=False,
        )
    if "precisions" in details:
        output.print(f"  {Precisions.model_validate(details['precisions']).summary()}", highlight=False)
    if details["parity"] is None:
        capabilities = ", ".join(details["compute_capabilities"])
        output.print(f"  not run here: built ahead of time for compute capability {capabilities}", highlight=False)
        return
    output.print(Parity.model_validate(details["parity"]).summary(), highlight=False)
