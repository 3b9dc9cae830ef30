"""Scikit-learn's digits in colours, as domain folders; and a StarGAN that is trained on them as published.

Data that needs no download, for what StarGAN is for: a translation shall change the colour and keep the digit.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from litdeploy.networks.families.stargan import Discriminator, StarGAN, discriminator, stargan

SIZE = 32
# Colour of the ink and of the ground, each on the scale 0–1.
DOMAINS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "blue": ((0.25, 0.4, 1.0), (0.05, 0.05, 0.1)),
    "green": ((0.2, 0.9, 0.3), (0.05, 0.1, 0.05)),
    "paper": ((0.15, 0.1, 0.1), (0.95, 0.9, 0.8)),
    "red": ((1.0, 0.25, 0.2), (0.1, 0.05, 0.05)),
}
_TEST_SHARE = 5  # every fifth digit


def write_folders(folder: Path) -> None:
    """Writes `domains/{train,test}/DOMAIN/…png` and `digits/{train,test}/DIGIT/…png`: the same images, sorted twice.

    Each digit has one domain: no translation is shown to anybody.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    draw = np.random.RandomState(0)
    for index, (strokes_HW, digit) in enumerate(zip(digits.images / 16, digits.target, strict=True)):
        domain = list(DOMAINS)[index // 10 % len(DOMAINS)]
        split = "test" if index % _TEST_SHARE == 0 else "train"
        image = Image.fromarray(_coloured(strokes_HW, domain, draw))
        for sorted_by, label in (("domains", domain), ("digits", str(digit))):
            path = folder / sorted_by / split / label / f"{index:04d}-{digit}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def _coloured(strokes_HW: NDArray[Any], domain: str, draw: np.random.RandomState) -> NDArray[np.uint8]:
    large_HW = F.interpolate(torch.from_numpy(strokes_HW)[None, None], SIZE, mode="bicubic")[0, 0].clamp(0, 1).numpy()
    ink_C, ground_C = (
        np.clip(np.array(colour) * draw.uniform(0.8, 1.0) + draw.normal(0, 0.05, 3), 0, 1) for colour in DOMAINS[domain]
    )
    image_HWC = ground_C + large_HW[:, :, None] * (ink_C - ground_C)
    return (255 * np.clip(image_HWC, 0, 1)).round().astype(np.uint8)


def read_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) in [−1, 1] of a folder of domain folders, and their domains (N)."""
    from PIL import Image

    files = [(file, label) for label, name in enumerate(DOMAINS) for file in sorted((folder / name).glob("*.png"))]
    pixels_NHWC = np.stack([np.asarray(Image.open(file)) for file, _ in files])
    images_NCHW = torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images_NCHW, torch.tensor([label for _, label in files])


def read_digits(folder: Path) -> Tensor:
    """The digits (N) of the images of `read_images`, by the names of their files."""
    return torch.tensor(
        [int(file.stem.split("-")[1]) for name in DOMAINS for file in sorted((folder / name).glob("*.png"))]
    )


def train_stargan(
    folder: Path, steps: int, blocks: int = 6, width: int = 16, batch_size: int = 16, seed: int = 0
) -> Iterator[tuple[int, dict[str, float], StarGAN, Discriminator]]:
    """Trains both networks as published (section 4.2: WGAN-GP, Adam with β 0.5 and 0.999), but with two updates of the
    discriminator for one of the generator instead of five, and at a learning rate of 2e-4 instead of 1e-4.

    Args:
        folder: with a folder for each domain.
        steps: updates of the generator.

    Returns:
        After every hundredth and the last: how many, the losses, and both networks.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    images_NCHW, labels_N = read_images(folder)
    generator = stargan(blocks, len(DOMAINS), width)
    critic = discriminator(4, len(DOMAINS), 2 * width, SIZE)
    of_generator, of_critic = (
        torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.999)) for network in (generator, critic)
    )
    for step in range(1, steps + 1):
        for _ in range(2):
            images, labels, targets = _batch(images_NCHW, labels_N, batch_size)
            with torch.no_grad():
                fake = generator(images, F.one_hot(targets, len(DOMAINS)).float())
            losses = _critic_losses(critic, images, labels, fake)
            of_critic.zero_grad()
            sum(losses.values()).backward()  # type: ignore[union-attr]
            of_critic.step()
        images, labels, targets = _batch(images_NCHW, labels_N, batch_size)
        losses |= generator_losses(generator, critic, images, labels, targets)
        of_generator.zero_grad()
        losses["generator"].backward()  # type: ignore[no-untyped-call]
        of_generator.step()
        if step % 100 == 0 or step == steps:
            yield step, {name: loss.item() for name, loss in losses.items()}, generator, critic


def _batch(images_NCHW: Tensor, labels_N: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.randint(len(labels_N), (size,))
    labels = labels_N[rows]
    return images_NCHW[rows], labels, labels[torch.randperm(size)]


def _critic_losses(critic: nn.Module, images: Tensor, labels: Tensor, fake: Tensor) -> dict[str, Tensor]:
    share = torch.rand(len(images), 1, 1, 1)
    between = (share * images + (1 - share) * fake).requires_grad_()
    real = critic(images)
    [slope] = torch.autograd.grad(critic(between)[0].sum(), between, create_graph=True)
    return {
        "real": -real[0].mean(),
        "fake": critic(fake)[0].mean(),
        "domain": F.cross_entropy(real[1], labels),
        "penalty": 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean(),
    }


def generator_losses(
    generator: nn.Module, critic: nn.Module, images: Tensor, labels: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Equation 6 of the paper, with λ_cls 1 and λ_rec 10."""
    wanted, own = (F.one_hot(which, len(DOMAINS)).float() for which in (targets, labels))
    fake = generator(images, wanted)
    realness, logits = critic(fake)
    parts = {
        "adversarial": -realness.mean(),
        "translated": F.cross_entropy(logits, targets),
        "cycle": (images - generator(fake, own)).abs().mean(),
    }
    return {**parts, "generator": parts["adversarial"] + parts["translated"] + 10 * parts["cycle"]}
