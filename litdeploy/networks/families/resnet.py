"""CIFAR ResNet, depth 6n+2 (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from litdeploy.config.spec import NORMALISATIONS, InputSpec, parse_normalisation
from litdeploy.errors import NetworkError
from litdeploy.networks.families.family import Arguments, Family, Reading, Weights, block_counts, fits, renamed

# How a block whose output is smaller and wider passes its input on: every other pixel with zeros for the new channels,
# half of them on each side (A) or all at the end (A-end); or a strided 1×1 convolution with batch norm (B). A and A-end
# have the same weights and compute different things; both are published as "option A".
Shortcut = Literal["A", "A-end", "B"]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: (N, in_channels, H, W) → (N, channels, H / stride, W / stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module
        if stride == 1 and in_channels == channels:
            self.shortcut = nn.Identity()
        elif shortcut == "B":
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        else:
            self.shortcut = ZeroPadding(channels - in_channels, stride, at_end=shortcut == "A-end")

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out_NCHW = F.relu(self.bn1(self.conv1(x_NCHW)))
        return F.relu(self.bn2(self.conv2(out_NCHW)) + self.shortcut(x_NCHW))


class ZeroPadding(nn.Module):
    """Take every `stride`-th pixel and add `channels` channels of zeros."""

    def __init__(self, channels: int, stride: int, at_end: bool) -> None:
        super().__init__()
        self.stride = stride
        self.before = 0 if at_end else channels // 2
        self.after = channels - self.before

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.pad(x_NCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class ResNet(nn.Module):
    """Stem, three sections of n blocks, head. The parameters have the names of most published checkpoints."""

    def __init__(self, n: int, classes: int, shortcut: Shortcut, width: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _section(n, width, width, 1, shortcut)
        self.layer2 = _section(n, width, 2 * width, 2, shortcut)
        self.layer3 = _section(n, 2 * width, 4 * width, 2, shortcut)
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = F.relu(self.bn1(self.conv1(x_NCHW)))
        x_NCHW = self.layer3(self.layer2(self.layer1(x_NCHW)))
        logits: Tensor = self.linear(x_NCHW.mean((2, 3)))
        return logits


def _section(n: int, in_channels: int, channels: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1, shortcut) for _ in range(n - 1)))


def resnet(
    depth: int = 56, classes: int = 10, shortcut: Shortcut = "A", width: int = 16, in_channels: int = 3
) -> ResNet:
    """Build a newly initialized CIFAR ResNet for images of any size.

    Args:
        depth: 6n+2.
        classes: width of the logits.
        shortcut: `A`, `A-end` or `B`.
        width: channels of the first section; the others have twice and four times as many.
        in_channels: of the images.

    Raises:
        NetworkError: a depth that is not 6n+2, or another value that no such network has.
    """
    if depth < 8 or (depth - 2) % 6:
        raise NetworkError(f"a CIFAR ResNet has depth 6n+2 (8, 14, 20, …, 56, …), not {depth}.")
    if shortcut not in ("A", "A-end", "B"):
        raise NetworkError(f"shortcut={shortcut}: a CIFAR ResNet's shortcuts are A, A-end or B.")
    if min(classes, width, in_channels) < 1:
        raise NetworkError("classes, width and in_channels are at least 1.")
    return ResNet((depth - 2) // 6, classes, shortcut, width, in_channels)


# Names of the same parameters in other code bases.
_OTHER_NAMES = (
    (r"^(conv_1_3x3|stem\.conv|conv0)\.", "conv1."),
    (r"^(bn_1|stem\.bn|bn0)\.", "bn1."),
    (r"^stage_?(\d)\.", r"layer\1."),
    (r"\.conv_a\.", ".conv1."),
    (r"\.bn_a\.", ".bn1."),
    (r"\.conv_b\.", ".conv2."),
    (r"\.bn_b\.", ".bn2."),
    (r"\.downsample\.(\d)", r".shortcut.\1"),
    (r"^(fc|classifier|head)\.", "linear."),
)


def _read(weights: Weights) -> list[Reading]:
    own = renamed(weights, _OTHER_NAMES)
    counts = block_counts(own)
    needed = {"conv1.weight": 4, "bn1.weight": 1, "linear.weight": 2, "layer1.0.conv2.weight": 4}
    if len(counts) != 3 or len(set(counts)) != 1 or not fits(own, needed) or "layer1.0.conv3.weight" in own:
        return []
    width, in_channels = own["conv1.weight"].shape[:2]
    arguments: Arguments = {
        "depth": 6 * counts[0] + 2,
        "classes": own["linear.weight"].shape[0],
        "width": width,
        "in_channels": in_channels,
    }
    if "layer2.0.shortcut.0.weight" in own:
        return [Reading({**arguments, "shortcut": "B"}, own, "layer2.0 has a convolution in its shortcut")]
    symmetric = Reading(
        {**arguments, "shortcut": "A"},
        own,
        "no weights in the shortcuts; zeros padded on both sides, as the name `linear` suggests",
    )
    at_end = Reading({**arguments, "shortcut": "A-end"}, own, "no weights in the shortcuts; zeros padded at the end")
    # The two paddings have the same weights; the names of the two code bases that most checkpoints come from differ.
    if "linear.weight" in weights:
        return [symmetric]
    if any(".conv_a." in name for name in weights):
        return [at_end]
    return [symmetric, at_end]


def _input(arguments: Arguments) -> InputSpec:
    channels = int(arguments.get("in_channels", 3))
    known = channels in (1, len(NORMALISATIONS["imagenet"][0]))
    mean, std = parse_normalisation("imagenet", channels) if known else ((0.5,) * channels, (0.5,) * channels)
    return InputSpec(shape=(channels, 32, 32), mean=mean, std=std)


FAMILY = Family("CIFAR ResNet", resnet, _read, _input, layers_per_block=2, sections=("layer1", "layer2", "layer3"))
