"""`litdeploy data pack`: a dataset as one file of decoded images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

import litdeploy
from litdeploy.cli import options as o
from litdeploy.cli.console import note, output, print_json
from litdeploy.cli.recipe_options import changes, recipe_options

if TYPE_CHECKING:
    from litdeploy.data import Packing

app = typer.Typer(help="Prepare datasets.", no_args_is_help=True, rich_markup_mode="rich", add_completion=False)


@app.callback()
def _data() -> None:
    """Prepare datasets."""


@app.command("pack")
@recipe_options({"image_column", "label_column", "labels", "image_size", "skip_bad"})
def pack_command(
    source: Annotated[str, typer.Argument(help="A dataset, as --data takes it elsewhere.")],
    out: Annotated[Path, typer.Option(help="The file to write, .safetensors.")],
    limit: Annotated[int | None, typer.Option(help="Most images of each split.", min=1)] = None,
    train_images: Annotated[int | None, typer.Option(help="Most training images, instead of --limit.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Random seed for which images are kept.", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    json: o.Json = False,
    **given: Any,
) -> None:
    """Write a dataset as one file, which --data reads without the libraries datasets and Pillow.

    With a limit, the same number of images is kept of each class.
    """
    packing = litdeploy.pack(
        {"source": source, **changes(given).get("data", {})},
        out,
        limit=limit,
        train_images=train_images,
        seed=seed,
        overwrite=overwrite,
    )
    if json:
        print_json(packing.model_dump(mode="json"))
    else:
        _show(packing)


def _show(packing: Packing) -> None:
    header = packing.header
    names = ", ".join(header.classes[:10]) + " …" * (len(header.classes) > 10)
    lines = {
        "file": packing.path,
        "bytes": f"{packing.bytes:,}",
        "SHA-256": packing.sha256,
        "images": " × ".join(map(str, header.shape)),
        "classes": f"{len(header.classes)} ({names})" if header.labeled else "none: without labels",
    }
    for key, value in lines.items():
        output.print(f"{key:<10} {value}", markup=False, highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("split")
    for name in ("images", "of"):
        table.add_column(name, justify="right")
    for split, count in header.images.items():
        table.add_row(split, f"{count:,}", f"{header.source_images[split]:,}")
    output.print(table)
    note(f"{packing.path}: written. Use it as --data {packing.path}")
