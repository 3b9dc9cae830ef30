"""`litdeploy demo`: all stages on data that comes with scikit-learn, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import litdeploy
from litdeploy.cli import deploy as deploy_command
from litdeploy.cli import options as o
from litdeploy.cli.console import note


def command(
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("demo"),
    overwrite: o.Overwrite = False,
) -> None:
    """Train a ResNet-56 on scikit-learn's digits, compress it to a ResNet-20, export, verify and profile it."""
    bundle, report = litdeploy.demo(out, overwrite=overwrite)
    deploy_command.show(bundle, report)
    note("The page above opens in any browser.")
