"""`litdeploy compare`: methods compared over depths and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import litdeploy
from litdeploy.cli import options as o
from litdeploy.cli.console import note, output, print_json, print_table, scored
from litdeploy.cli.recipe_options import OF_A_GRID, changes, recipe_options

if TYPE_CHECKING:
    from litdeploy.comparison import MethodComparison


@recipe_options(without=OF_A_GRID)
def command(
    recipe: Annotated[str, typer.Argument(help="Name or path of the recipe that all students share.")],
    teacher: Annotated[Path, typer.Option(help="The teacher's weights: .pt .pth .th .bin .safetensors.")],
    depths: Annotated[str, typer.Option(help="Depths of the students, as in 14,20,32.", metavar="N,…")],
    methods: Annotated[str, typer.Option(help="The methods to compare.", metavar="NAME,…")] = "scratch,kd,hint,lit",
    seeds: Annotated[int, typer.Option(help="Trainings per method and depth, with seeds 0, 1, …", min=1)] = 3,
    device: o.Device = "auto",
    out: Annotated[Path, typer.Option(help="The folder of the comparison.")] = Path("comparison"),
    list_: Annotated[
        bool, typer.Option("--list", help="Print a command for each missing training, and train nothing.")
    ] = False,
    gather: Annotated[bool, typer.Option("--gather", help="Gather the finished trainings, and train nothing.")] = False,
    json: o.Json = False,
    **given: Any,
) -> None:
    """Train every method at every depth on the same teacher, data and epochs, and compare them."""
    from litdeploy.comparison import commands

    grid: dict[str, Any] = {
        "recipe": recipe,
        "methods": [name for name in o.words(methods) if name],
        "depths": o.whole_numbers(depths, "--depths", "14,20,32"),
        "seeds": seeds,
        "out": out,
        "device": device,
        **changes(given),
    }
    if list_:
        for line in commands(teacher, **grid):
            typer.echo(line)
        return
    result = litdeploy.compare(teacher, train=not gather, **grid)
    if json:
        print_json(result)
    else:
        show(result, out)


def show(result: MethodComparison, out: Path) -> None:
    """Print the table, the missing trainings, and the page's path."""
    from litdeploy.comparison.report import accuracies

    print_table(accuracies(result))
    if result.teacher_accuracy is not None:
        output.print(f"{result.teacher_name}, the teacher: {scored(result.teacher_accuracy)}", highlight=False)
    for name, why in result.failed.items():
        note(f"{name} failed: {why}")
    if result.missing:
        note(f"{len(result.missing)} trainings are missing; litdeploy compare … --list prints their commands.")
    note(f"{out / 'comparison.html'}")
