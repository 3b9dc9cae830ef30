"""`litdeploy export`: from a bundle to artefacts that other people's servers load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from litdeploy.cli import options as o
from litdeploy.cli.console import note, output, print_json
from litdeploy.errors import SettingsError

if TYPE_CHECKING:
    from litdeploy.bundle import Artefact


def command(
    bundle: o.BundlePath = o.DEFAULT_BUNDLE,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write student.onnx, held against PyTorch.")] = False,
    target: o.TargetName = None,
    data: o.Data = None,
    network: o.Network = None,
    json: o.Json = False,
) -> None:
    """Export the student, and prove that the file computes what it computes."""
    if not onnx:
        raise SettingsError("say what to export: --onnx")
    from litdeploy.exporter import export

    manifest = export(bundle, onnx=onnx, target=target, data=data, network=network)
    if json:
        print_json({kind: artefact.model_dump(mode="json") for kind, artefact in manifest.artefacts.items()})
        return
    for artefact in manifest.artefacts.values():
        show(artefact)
    note(f"Next: litdeploy profile{'' if bundle == o.DEFAULT_BUNDLE else f' {bundle}'}")


def show(artefact: Artefact) -> None:
    """Prints an exported file and how it was held against PyTorch."""
    from litdeploy.exporter import Parity

    details = artefact.details
    output.print(
        f"{artefact.path}   opset {details['opset']}   {artefact.precision}   {details['bytes']:,} bytes",
        highlight=False,
    )
    output.print(Parity.model_validate(details["parity"]).told(), highlight=False)
