"""`litdeploy train`: a network from new weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import litdeploy
from litdeploy.cli import options as o
from litdeploy.cli.console import output, print_json, scored
from litdeploy.cli.recipe_options import OF_A_STUDENT, changes, recipe_options


@recipe_options(without={"network", *OF_A_STUDENT})
def command(
    network: Annotated[str, typer.Argument(help="resnet56, vdcnn17, timm:NAME, hf:NAME, package.module:function.")],
    recipe: o.RecipeName = None,
    device: o.Device = "auto",
    out: Annotated[Path, typer.Option(help="The file of weights, .safetensors.")] = Path("teacher.safetensors"),
    json: o.Json = False,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    checkpoint_every: o.CheckpointEvery = "10min",
    **given: Any,
) -> None:
    """Train a network from new weights: a teacher, or the from-scratch baseline."""
    from litdeploy.trainer.distributed import launched

    trained = litdeploy.train(
        network,
        recipe=recipe,
        out=out,
        device=device,
        overwrite=overwrite,
        resume=resume,
        checkpoint_every=checkpoint_every,
        **changes(given),
    )
    if launched().rank:
        return
    splits = {"validation": trained.validation, "test": trained.test}
    if json:
        print_json({"path": str(trained.path), **{split: score.model_dump() for split, score in splits.items()}})
    else:
        scores = "   ".join(f"{split} {scored(score)}" for split, score in splits.items())
        output.print(f"{trained.path}   {scores}", highlight=False)
