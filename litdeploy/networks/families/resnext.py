"""CIFAR ResNeXt, depth 9n+2 (Xie et al., "Aggregated Residual Transformations", CVPR 2017, section 5.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from litdeploy.errors import NetworkError
from litdeploy.networks.families.family import Arguments, Family, Reading, Weights, block_counts, fits, renamed
from litdeploy.networks.families.resnet import FAMILY as RESNET


class Bottleneck(nn.Module):
    """1×1, grouped 3×3 and 1×1 convolution: (N, in_channels, H, W) → (N, channels, H / stride, W / stride)."""

    def __init__(self, in_channels: int, inner: int, channels: int, stride: int, cardinality: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=cardinality, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out_NCHW = F.relu(self.bn1(self.conv1(x_NCHW)))
        out_NCHW = F.relu(self.bn2(self.conv2(out_NCHW)))
        return F.relu(self.bn3(self.conv3(out_NCHW)) + self.shortcut(x_NCHW))


class ResNeXt(nn.Module):
    """Stem of `stem_width` channels, three sections of n blocks, head."""

    def __init__(
        self,
        n: int,
        classes: int,
        cardinality: int,
        width: int,
        out_width: int,
        stem_width: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, stem_width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        inner = cardinality * width
        self.layer1 = _section(n, stem_width, inner, out_width, 1, cardinality)
        self.layer2 = _section(n, out_width, 2 * inner, 2 * out_width, 2, cardinality)
        self.layer3 = _section(n, 2 * out_width, 4 * inner, 4 * out_width, 2, cardinality)
        self.linear = nn.Linear(4 * out_width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = F.relu(self.bn1(self.conv1(x_NCHW)))
        x_NCHW = self.layer3(self.layer2(self.layer1(x_NCHW)))
        logits: Tensor = self.linear(x_NCHW.mean((2, 3)))
        return logits


def _section(n: int, in_channels: int, inner: int, channels: int, stride: int, cardinality: int) -> nn.Sequential:
    first = Bottleneck(in_channels, inner, channels, stride, cardinality)
    return nn.Sequential(first, *(Bottleneck(channels, inner, channels, 1, cardinality) for _ in range(n - 1)))


def resnext(
    depth: int = 29,
    classes: int = 10,
    cardinality: int = 8,
    width: int = 64,
    out_width: int = 256,
    stem_width: int = 64,
    in_channels: int = 3,
) -> ResNeXt:
    """Build a newly initialized CIFAR ResNeXt for images of any size.

    Args:
        depth: 9n+2.
        classes: width of the logits.
        cardinality: groups of each 3×3 convolution.
        width: channels of one group in the first section; the others have twice and four times as many.
        out_width: channels that the first section gives; likewise doubled.
        stem_width: channels of the stem.
        in_channels: of the images.

    Raises:
        NetworkError: a depth that is not 9n+2, or another value that no such network has.
    """
    if depth < 11 or (depth - 2) % 9:
        raise NetworkError(f"a CIFAR ResNeXt has depth 9n+2 (11, 20, 29, 38, …), not {depth}.")
    if min(classes, cardinality, width, out_width, stem_width, in_channels) < 1:
        raise NetworkError("classes, cardinality, the widths and in_channels are at least 1.")
    return ResNeXt((depth - 2) // 9, classes, cardinality, width, out_width, stem_width, in_channels)


# Names of the same parameters in other code bases.
_OTHER_NAMES = (
    (r"^conv_1_3x3\.", "conv1."),
    (r"^bn_1\.", "bn1."),
    (r"^stage_(\d)\.stage_\d_bottleneck_(\d+)\.", r"layer\1.\2."),
    (r"\.shortcut_conv\.", ".0."),
    (r"\.shortcut_bn\.", ".1."),
    (r"\.conv_reduce\.", ".conv1."),
    (r"\.bn_reduce\.", ".bn1."),
    (r"\.conv_conv\.", ".conv2."),
    (r"\.bn\.", ".bn2."),
    (r"\.conv_expand\.", ".conv3."),
    (r"\.bn_expand\.", ".bn3."),
    (r"\.downsample\.(\d)", r".shortcut.\1"),
    (r"^(fc|classifier|head)\.", "linear."),
)


def _read(weights: Weights) -> list[Reading]:
    own = renamed(weights, _OTHER_NAMES)
    counts = block_counts(own)
    convolutions = ("conv1.weight", "layer1.0.conv2.weight", "layer1.0.conv3.weight")
    needed = {"bn1.weight": 1, "linear.weight": 2, **dict.fromkeys(convolutions, 4)}
    if len(counts) != 3 or len(set(counts)) != 1 or not fits(own, needed):
        return []
    inner, width = own["layer1.0.conv2.weight"].shape[:2]
    arguments: Arguments = {
        "depth": 9 * counts[0] + 2,
        "classes": own["linear.weight"].shape[0],
        "cardinality": inner // width,
        "width": width,
        "out_width": own["layer1.0.conv3.weight"].shape[0],
        "stem_width": own["conv1.weight"].shape[0],
        "in_channels": own["conv1.weight"].shape[1],
    }
    return [Reading(arguments, own, f"three sections of {counts[0]} bottlenecks with grouped convolutions")]


FAMILY = Family("CIFAR ResNeXt", resnext, _read, RESNET.input, layers_per_block=3, sections=RESNET.sections)
