"""`litdeploy demo`: the whole way on embedded data, no download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from litdeploy.cli import export as export_command
from litdeploy.cli import options as o
from litdeploy.cli import profile as profile_command
from litdeploy.cli.console import note, output, scored, training_progress


def command(
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("demo"),
    overwrite: o.Overwrite = False,
) -> None:
    """Train a ResNet-56 on scikit-learn's digits, make it a ResNet-20, export, verify and profile it."""
    from litdeploy.pipeline import demo

    bundle, report = demo(out, overwrite=overwrite, progress=training_progress())
    manifest = bundle.read()
    for role in ("teacher", "student"):
        output.print(f"{role}   test {scored(manifest.metrics[role]['test'])}", highlight=False)
    for artefact in manifest.artefacts.values():
        export_command.show(artefact)
    profile_command.show(report, bundle.path)
    note("The page above opens in any browser.")
