"""A StarGAN's student judged by classifiers that saw real images only: does it make the domain, and keep the digit?

    python -m benchmarks.stargan --folder FOLDER --out FILE

Trains the teacher on coloured digits (`--steps`); two judges, of the domain and of the digit; and students of two
blocks: LIT alone, and fine-tuned against the teacher's discriminator with and without a hold at the teacher's images.
What FOLDER holds already is not trained again. Judged on the test images, each translated to the three other domains.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coloured_digits import DOMAINS, SIZE, read_digits, read_images, train_stargan, write_folders
from litdeploy.config.recipe import read_recipe
from litdeploy.networks import load
from litdeploy.networks.student import make_student
from litdeploy.profiler.machine.conditions import current_environment
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Likeness
from litdeploy.tasks.translation import as_vectors
from litdeploy.trainer import compress, train

_SHAPE = (3, SIZE, SIZE)
_RECIPE = "coloured-digits-stargan"
# Name → changes of the recipe.
_STUDENTS: dict[str, dict[str, Any]] = {
    "LIT": {"finetune": {"epochs": 0, "learning_rate": 1e-4}},
    "LIT, then adversarial": {},
    "LIT, then adversarial, equation 6 alone": {
        "finetune": {"epochs": 4, "learning_rate": 1e-4},
        "teacher_weight": 0,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of images and networks; made where it is not there")
    parser.add_argument("--steps", type=int, default=1500, help="of the teacher's training")
    parser.add_argument("--judge-epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    if not (folder / "domains").is_dir():
        write_folders(folder)
    if not (folder / "G.pt").is_file():
        _train_teacher(folder, arguments.steps)
    judges = {name: _judge(folder, name, arguments.judge_epochs) for name in ("domains", "digits")}
    networks: dict[str, nn.Module] = {"teacher": load(folder / "G.pt", input_shape=_SHAPE).module}
    networks["cut, not trained"] = make_student(networks["teacher"], {"blocks": (0, 5)}).eval()
    found: dict[str, Any] = {}
    for name, changes in _STUDENTS.items():
        bundle = Bundle(folder / re.sub(r"\W+", "-", name.replace(", then", "").lower()))
        if not bundle.exists():
            compress(
                folder / "G.pt",
                recipe=_RECIPE,
                data=folder / "domains",
                discriminator=str(folder / "D.pt"),
                out=bundle.path,
                **changes,
            )
        networks[name] = load(bundle.student_path).module
        score = bundle.read_complete().metrics["student"]["test"]
        assert isinstance(score, Likeness)
        found[name] = {"psnr": score.psnr, "ssim": score.ssim, "seconds": bundle.read_complete().run.seconds}
    images_NCHW, labels_N = read_images(folder / "domains" / "test")
    digits_N = read_digits(folder / "domains" / "test")
    with torch.no_grad():
        found["real images"] = {
            "domain": _share(judges["domains"], images_NCHW, labels_N),
            "digit": _share(judges["digits"], images_NCHW, digits_N),
        }
        for name, network in networks.items():
            judged = _judged(network.eval(), judges, images_NCHW, labels_N, digits_N)
            found[name] = {**judged, **found.get(name, {})}
    content = {
        "environment": current_environment(torch.device("cpu")).model_dump(mode="json"),
        "recipe": read_recipe(_RECIPE).model_dump(mode="json", exclude_defaults=True),
        "teacher_steps": arguments.steps,
        "test_images": len(labels_N),
        "found": found,
    }
    arguments.out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, row in found.items():
        print(f"| {name} | " + " | ".join(f"{key} {value:.4g}" for key, value in row.items()) + " |")


def _train_teacher(folder: Path, steps: int) -> None:
    for step, losses, generator, critic in train_stargan(folder / "domains" / "train", steps):
        print(
            f"teacher, step {step}: " + "  ".join(f"{name} {value:.3f}" for name, value in losses.items()), flush=True
        )
        if step == steps:
            torch.save(critic.state_dict(), folder / "D.pt")
            torch.save(generator.state_dict(), folder / "G.pt")


def _judge(folder: Path, name: str, epochs: int) -> nn.Module:
    """A classifier of real images; the domain's (or the digit's) names are its classes, in sorted order."""
    path = folder / f"judge-{name}.safetensors"
    if not path.is_file():
        train("resnet8", data=folder / name, epochs=epochs, normalise="half", batch_size=32, out=path)
    return load(path).module.eval()


def _judged(
    generator: nn.Module, judges: dict[str, nn.Module], images_NCHW: Tensor, labels_N: Tensor, digits_N: Tensor
) -> dict[str, float]:
    """Shares of all translations to another domain of which the judges find that domain, and the digit that it was."""
    domains, digits = [], []
    for shift in range(1, len(DOMAINS)):
        wanted_N = (labels_N + shift) % len(DOMAINS)
        made_NCHW = generator(images_NCHW, as_vectors(wanted_N, len(DOMAINS)))
        domains.append(_share(judges["domains"], made_NCHW, wanted_N))
        digits.append(_share(judges["digits"], made_NCHW, digits_N))
    return {"domain": sum(domains) / len(domains), "digit": sum(digits) / len(digits)}


def _share(judge: Callable[[Tensor], Tensor], images_NCHW: Tensor, labels_N: Tensor) -> float:
    return (judge(images_NCHW).argmax(1) == labels_N).double().mean().item()


if __name__ == "__main__":
    main()
