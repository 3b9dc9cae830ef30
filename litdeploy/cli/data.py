"""`litdeploy data pack`: a dataset as one file of decoded images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from litdeploy.cli import options as o
from litdeploy.cli.console import note, output, print_json

if TYPE_CHECKING:
    from litdeploy.data import Packing

app = typer.Typer(help="Prepare datasets.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _data() -> None:
    """Prepare datasets."""


@app.command("pack")
def pack_command(
    source: Annotated[str, typer.Argument(help="What --data takes elsewhere.")],
    out: Annotated[Path, typer.Option(help="The file to write, .safetensors.")],
    limit: Annotated[int | None, typer.Option(help="The most images of each split.", min=1)] = None,
    train_images: Annotated[int | None, typer.Option(help="The most training images, over --limit.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the draw, where images are left out.", min=0)] = 0,
    image_column: o.ImageColumn = None,
    label_column: o.LabelColumn = None,
    image_size: o.ImageSize = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    json: o.Json = False,
) -> None:
    """Write a dataset as one file, which --data takes where `datasets` and Pillow are missing.

    Where images are left out, as many are kept of each class.
    """
    from litdeploy.data import pack

    packing = pack(
        o.given(source=source, image_column=image_column, label_column=label_column, image_size=o.size_of(image_size)),
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
        "classes": f"{len(header.classes)} ({names})",
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
