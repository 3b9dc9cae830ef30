"""StarGAN (Choi et al., "StarGAN: Unified Generative Adversarial Networks for Multi-Domain Image-to-Image
Translation", CVPR 2018, section 7): generator and discriminator.

Shape suffixes: N images, C channels, H height, W width, K domains.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from litdeploy.config.spec import MOST_DOMAINS, MOST_VALUES, InputSpec, TranslationInput
from litdeploy.errors import NetworkError
from litdeploy.networks.families.family import Arguments, Family, Reading, Weights, fits

_STEM_LAYERS = 9  # three times convolution, instance norm, ReLU
_LEAK = 0.01
_MOST_LAYERS = 12  # they halve the largest possible image down to one pixel
_NUMBER = "[0-9]{1,5}"  # in the name of a weight
_IMAGE_SIZE = 128  # as in the published checkpoints; the weights do not show it


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with instance norm, added to what came in: (N, channels, H, W) → the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            _norm(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            _norm(channels),
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        changed_NCHW: Tensor = self.main(x_NCHW)
        return x_NCHW + changed_NCHW


class StarGAN(nn.Module):
    """The generator: stem (a quarter of the size, four times the width), residual blocks, head back to the image."""

    def __init__(self, blocks: int, domains: int, width: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_down(in_channels + domains, width, kernel=7, stride=1, padding=3),
            *_down(width, 2 * width, kernel=4, stride=2, padding=1),
            *_down(2 * width, 4 * width, kernel=4, stride=2, padding=1),
        )
        self.blocks = nn.Sequential(*(ResidualBlock(4 * width) for _ in range(blocks)))
        self.head = nn.Sequential(
            *_up(4 * width, 2 * width),
            *_up(2 * width, width),
            nn.Conv2d(width, in_channels, 7, 1, 3, bias=False),
            nn.Tanh(),
        )

    def forward(self, images: Tensor, domains: Tensor) -> Tensor:
        """Images (N, C, H, W) in [−1, 1], H and W multiples of four, and the domains (N, K) that they shall have: one
        of them 1, or each an attribute, 0 or 1. Gives images of the same shape in [−1, 1]."""
        maps_NKHW = domains[:, :, None, None].expand(-1, -1, *images.shape[2:])
        translated: Tensor = self.head(self.blocks(self.stem(torch.cat([images, maps_NKHW], 1))))
        return translated


class Judgement(NamedTuple):
    """What the discriminator says of images: how real each patch is (N, 1, H / 2^layers, W / 2^layers), unbounded, and
    the logits (N, K) of the domains."""

    realness: Tensor
    logits: Tensor


class Discriminator(nn.Module):
    """PatchGAN with a second head. Names of the parameters are the published ones."""

    task = "classification"  # of the domains; `realness` is the other output

    def __init__(self, layers: int, domains: int, width: int, kernel: int, in_channels: int) -> None:
        super().__init__()
        widths = [in_channels, *(width * 2**index for index in range(layers))]
        self.main = nn.Sequential(
            *(
                part
                for index in range(layers)
                for part in (nn.Conv2d(widths[index], widths[index + 1], 4, 2, 1), nn.LeakyReLU(_LEAK))
            )
        )
        self.conv1 = nn.Conv2d(widths[-1], 1, 3, 1, 1, bias=False)
        self.conv2 = nn.Conv2d(widths[-1], domains, kernel, bias=False)

    def forward(self, images: Tensor) -> Judgement:
        """Score images (N, C, H, W) in [−1, 1]."""
        hidden_NCHW = self.main(images)
        return Judgement(self.conv1(hidden_NCHW), self.conv2(hidden_NCHW).flatten(1))


def _norm(channels: int) -> nn.InstanceNorm2d:
    # By each image's own statistics, always. The published code keeps running ones too, and never uses them: its
    # generator stays in training mode, for its samples too. In eval mode they would spoil the image.
    return nn.InstanceNorm2d(channels, affine=True)


def _down(in_channels: int, channels: int, kernel: int, stride: int, padding: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False), _norm(channels), nn.ReLU()


def _up(in_channels: int, channels: int) -> tuple[nn.Module, ...]:
    return nn.ConvTranspose2d(in_channels, channels, 4, 2, 1, bias=False), _norm(channels), nn.ReLU()


def stargan(blocks: int = 6, domains: int = 5, width: int = 64, in_channels: int = 3) -> StarGAN:
    """Build a newly initialized generator for images of any size that is a multiple of four.

    Args:
        blocks: residual blocks.
        domains: K.
        width: channels behind the first convolution; the residual blocks have four times as many.
        in_channels: of the images.

    Raises:
        NetworkError: a number below 1.
    """
    if min(blocks, domains, width, in_channels) < 1:
        raise NetworkError("blocks, domains, width and in_channels of a StarGAN are at least 1.")
    return StarGAN(blocks, domains, width, in_channels)


def discriminator(
    layers: int = 6, domains: int = 5, width: int = 64, image_size: int = 128, in_channels: int = 3
) -> Discriminator:
    """Build a newly initialized discriminator.

    Args:
        layers: convolutions, each of which halves the size and all but the first of which double the width.
        domains: K.
        width: channels behind the first.
        image_size: height and width of the images; a multiple of 2^layers.
        in_channels: of the images.

    Raises:
        NetworkError: a number below 1, or a size that cannot be halved so often.
    """
    if min(layers, domains, width, image_size, in_channels) < 1 or layers > _MOST_LAYERS:
        raise NetworkError(
            "layers, domains, width, image_size and in_channels of a discriminator are at least 1, and layers at most "
            f"{_MOST_LAYERS}."
        )
    if image_size % 2**layers:
        raise NetworkError(
            f"a discriminator of {layers} layers takes images of a multiple of {2**layers} pixels, not {image_size}. "
            f"Give it fewer layers: {max(n for n in range(layers) if image_size % 2**n == 0)} or less."
        )
    return Discriminator(layers, domains, width, image_size // 2**layers, in_channels)


def _read_discriminator(weights: Weights) -> list[Reading]:
    if not fits(weights, {"main.0.weight": 4, "conv1.weight": 4, "conv2.weight": 4}):
        return []
    layers = sum(f"main.{2 * index}.weight" in weights for index in range(_MOST_LAYERS))
    domains, _, kernel, _ = weights["conv2.weight"].shape
    width, in_channels = weights["main.0.weight"].shape[:2]
    image_size = kernel * 2**layers
    if in_channels * image_size**2 > MOST_VALUES:
        return []
    arguments: Arguments = {
        "layers": layers,
        "domains": domains,
        "width": width,
        "image_size": image_size,
        "in_channels": in_channels,
    }
    return [Reading(arguments, dict(weights), f"{layers} strided convolutions, and the heads conv1 and conv2")]


def _read(weights: Weights) -> list[Reading]:
    own = _own_names(weights)
    blocks = {int(match[1]) for name in own if (match := re.match(rf"blocks\.({_NUMBER})\.main\.0\.weight$", name))}
    if not blocks or blocks != set(range(len(blocks))) or not fits(own, {"stem.0.weight": 4, "head.6.weight": 4}):
        return []
    width, channels = own["stem.0.weight"].shape[:2]
    in_channels = own["head.6.weight"].shape[0]
    domains = channels - in_channels
    if not 1 <= domains <= MOST_DOMAINS or in_channels * _IMAGE_SIZE**2 > MOST_VALUES:
        return []
    arguments: Arguments = {"blocks": len(blocks), "domains": domains, "width": width, "in_channels": in_channels}
    return [Reading(arguments, own, f"{len(blocks)} residual blocks between two strided and two transposed layers")]


def _own_names(weights: Weights) -> dict[str, Tensor]:
    """The weights by the names of `StarGAN`; the published code numbers all layers through in one `main`.

    Running statistics are left out: see `_norm`.
    """
    kept = {
        name: tensor for name, tensor in weights.items() if not re.search(r"\.(running_\w+|num_batches_\w+)$", name)
    }
    published = {int(match[1]) for name in kept if (match := re.match(rf"main\.({_NUMBER})\.main\.", name))}
    if not published or min(published) != _STEM_LAYERS:
        return kept
    head = max(published) + 1

    def renamed(match: re.Match[str]) -> str:
        index = int(match[1])
        if index < _STEM_LAYERS:
            return f"stem.{index}."
        return f"blocks.{index - _STEM_LAYERS}." if index < head else f"head.{index - head}."

    return {re.sub(rf"^main\.({_NUMBER})\.", renamed, name): tensor for name, tensor in kept.items()}


def _images(channels: int, size: int) -> InputSpec:
    return InputSpec(shape=(channels, size, size), mean=(0.5,) * channels, std=(0.5,) * channels)


def _input(arguments: Arguments) -> TranslationInput:
    return TranslationInput(
        images=_images(int(arguments.get("in_channels", 3)), _IMAGE_SIZE), domains=int(arguments["domains"])
    )


def _discriminator_input(arguments: Arguments) -> InputSpec:
    return _images(int(arguments.get("in_channels", 3)), int(arguments.get("image_size", 128)))


FAMILY = Family(
    "StarGAN", stargan, _read, _input, layers_per_block=2, layers_around=6, sections=("blocks",), classes="domains"
)
# Never shortened: it judges what a generator makes.
DISCRIMINATOR = Family(
    "StarGAN discriminator",
    discriminator,
    _read_discriminator,
    _discriminator_input,
    layers_per_block=1,
    classes="domains",
)
