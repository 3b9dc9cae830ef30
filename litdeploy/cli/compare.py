"""`litdeploy compare`: methods held against one another, over depths and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from litdeploy.cli import options as o
from litdeploy.cli.console import note, output, print_table, scored, training_progress

if TYPE_CHECKING:
    from litdeploy.comparison import MethodComparison


def command(
    recipe: Annotated[str, typer.Argument(help="What all students share: a recipe's name or path.")],
    teacher: Annotated[Path, typer.Option(help="The teacher's weights: .pt .pth .th .bin .safetensors.")],
    depths: Annotated[str, typer.Option(help="Depths of the students, as in 14,20,32.", metavar="N,…")],
    methods: Annotated[str, typer.Option(help="What is compared.", metavar="NAME,…")] = "scratch,kd,hint,lit",
    seeds: Annotated[int, typer.Option(help="Trainings of each method and depth: seeds 0, 1, …", min=1)] = 3,
    data: o.Data = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    precision: o.Precision = None,
    compile: o.Compile = None,
    feature_cache: o.FeatureCache = None,
    device: o.Device = "auto",
    network: o.Network = None,
    normalise: o.Normalise = None,
    out: Annotated[Path, typer.Option(help="The folder of the comparison.")] = Path("comparison"),
    list_: Annotated[
        bool, typer.Option("--list", help="Print a command for each training that is left, and train nothing.")
    ] = False,
    gather: Annotated[bool, typer.Option("--gather", help="Gather what is there, and train nothing.")] = False,
    json: o.Json = False,
) -> None:
    """Train every method at every depth with the same teacher, data and epochs, and compare them."""
    from litdeploy.comparison import commands, compare

    asked: dict[str, Any] = {
        "recipe": recipe,
        "methods": [name.strip() for name in methods.split(",") if name.strip()],
        "depths": o.whole_numbers(depths, "--depths", "14,20,32"),
        "seeds": seeds,
        "out": out,
        "device": device,
        "data": o.given(source=data),
        "epochs": epochs,
        "batch_size": batch_size,
        "precision": precision,
        "compile": compile,
        "feature_cache": o.views_of(feature_cache),
        "network": network,
        "normalise": normalise,
    }
    if list_:
        for line in commands(teacher, progress=training_progress(), **asked):
            typer.echo(line)
        return
    result = compare(teacher, train=not gather, progress=training_progress(), **asked)
    if json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        show(result, out)


def show(result: MethodComparison, out: Path) -> None:
    """Prints the table, what is missing, and where the page is."""
    from litdeploy.comparison.page import accuracies

    print_table(accuracies(result))
    if result.teacher_accuracy is not None:
        output.print(f"{result.teacher_name}, the teacher: {scored(result.teacher_accuracy)}", highlight=False)
    for name, why in result.failed.items():
        note(f"{name} failed: {why}")
    if result.missing:
        note(f"{len(result.missing)} trainings are missing; litdeploy compare … --list prints their commands.")
    note(f"{out / 'comparison.html'}")
