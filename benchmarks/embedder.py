"""A sentence embedder made half as deep on unlabeled film reviews, by LIT and by what users do today.

    python -m benchmarks.embedder --teacher FOLDER --data FOLDER_WITH_IMDB --folder FOLDER --out FILE

`--teacher` is a folder of sentence-transformers, such as all-MiniLM-L6-v2. The labels of the reviews are not used. Each
method gets the same texts, epochs, optimizer and initial blocks, and starts from the cut alone:

    lit      LIT: sections on the teacher's tensors, and the embedding
    cosine   the embedding alone, by 1 − cosine: layer reduction, as users do it today

The mean squared error of sentence-transformers' examples is left out: for normalized embeddings of D values it is
2 (1 − cosine) / D, and AdamW does not see the factor. Measured on held-out reviews. What FOLDER holds already is not
trained again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from litdeploy.profiler.machine.conditions import current_environment
from litdeploy.runtime import resolve_device
from litdeploy.trainer import compress

_METHODS: dict[str, dict[str, Any]] = {
    "lit": {"method": "lit"},
    "cosine": {"method": "kd", "init": "copy"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="train.parquet and test.parquet with a column text")
    parser.add_argument("--folder", type=Path, required=True, help="of texts and students; made where it is not there")
    parser.add_argument("--texts", type=int, default=8000, help="to train on")
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--methods", default=",".join(_METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="a field of all recipes")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    texts = _texts(arguments.data, folder / "texts", arguments.texts, arguments.held_out)
    common = {key: json.loads(value) for key, _, value in (each.partition("=") for each in arguments.set)}
    found: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for name in arguments.methods.split(","):
            bundle = compress(
                arguments.teacher,
                data={"source": str(texts), "text_length": arguments.tokens},
                student_depth=arguments.depth,
                epochs=arguments.epochs,
                seed=seed,
                out=folder / f"{name}-{seed}",
                resume=True,
                **{**common, **_METHODS[name]},
            )
            manifest = bundle.read_complete()
            found.append(
                {
                    "method": name,
                    "seed": seed,
                    "seconds": manifest.run.seconds,
                    "metrics": {
                        role: {split: score.model_dump(mode="json") for split, score in scores.items()}
                        for role, scores in manifest.metrics.items()
                    },
                    "recipe": manifest.recipe.model_dump(mode="json", exclude_defaults=True),
                }
            )
            content = {
                "settings": {key: value for key, value in vars(arguments).items() if key not in ("folder", "out")},
                "environment": current_environment(resolve_device("auto")).model_dump(mode="json"),
                "runs": found,
            }
            arguments.out.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
            score = manifest.metrics["student"]["test"].summary()
            print(f"{name:<8} seed {seed}   {score}   {manifest.run.seconds:.0f} s")


def _texts(source: Path, target: Path, train: int, held_out: int) -> Path:
    """The reviews as text files, one a line."""
    for split, count in (("train", train), ("test", held_out)):
        path = target / f"{split}.txt"
        if not path.is_file():
            target.mkdir(parents=True, exist_ok=True)
            texts = parquet.read_table(source / f"{split}.parquet", columns=["text"])["text"][:count].to_pylist()
            path.write_text("".join(" ".join(text.split()) + "\n" for text in texts), encoding="utf-8")
    return target


if __name__ == "__main__":
    main()
