"""VDCNN for texts, depth 9, 17, 29 or 49 (Conneau et al., "Very Deep Convolutional Networks for Text Classification",
EACL 2017, section 3).

Shape suffixes: N texts, C channels, L characters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdeploy.config.spec import CharacterInput
from litdeploy.errors import NetworkError
from litdeploy.networks.families.family import Arguments, Family, Reading, Weights, block_counts

# Depth → blocks of each section (table 2 of the paper). A block has two convolutions; one more is in the stem.
BLOCKS = {9: (1, 1, 1, 1), 17: (2, 2, 2, 2), 29: (5, 5, 2, 2), 49: (8, 8, 5, 3)}
_EMBEDDING = 16
_KEPT = 8
# Three times halved, and the k-max pooling keeps eight of what is left.
_LEAST_LENGTH = 8 * _KEPT


class ConvBlock(nn.Module):
    """Two convolutions of size 3, and a shortcut if there are any: (N, in_channels, L) → (N, channels, L)."""

    def __init__(self, in_channels: int, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm1d(channels)
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm1d(channels)
        self.shortcut: nn.Module | None = None
        if shortcut and in_channels == channels:
            self.shortcut = nn.Identity()
        elif shortcut:
            self.shortcut = nn.Sequential(nn.Conv1d(in_channels, channels, 1, bias=False), nn.BatchNorm1d(channels))

    def forward(self, x_NCL: Tensor) -> Tensor:
        out_NCL = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x_NCL)))))
        return F.relu(out_NCL if self.shortcut is None else out_NCL + self.shortcut(x_NCL))


class VDCNN(nn.Module):
    """Embedded characters, a convolution, four sections with max pooling between, k-max pooling, linear layers."""

    def __init__(
        self, blocks: tuple[int, ...], classes: int, shortcut: bool, width: int, hidden: int, vocabulary: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, _EMBEDDING, padding_idx=0)
        self.conv1 = nn.Conv1d(_EMBEDDING, width, 3, padding=1)
        self.layer1 = _section(blocks[0], width, width, shortcut)
        self.layer2 = _section(blocks[1], width, 2 * width, shortcut)
        self.layer3 = _section(blocks[2], 2 * width, 4 * width, shortcut)
        self.layer4 = _section(blocks[3], 4 * width, 8 * width, shortcut)
        self.fc1 = nn.Linear(8 * width * _KEPT, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        # The k largest are positive and much alike in all texts: what they have in common would drown what differs, and
        # the first steps would switch fc1 off to be rid of it.
        with torch.no_grad():
            self.fc1.weight -= self.fc1.weight.mean(1, keepdim=True)
        nn.init.normal_(self.fc3.weight, std=0.01)

    def forward(self, characters_NL: Tensor) -> Tensor:
        if characters_NL.shape[1] < _LEAST_LENGTH:
            raise NetworkError(
                f"a VDCNN takes texts of at least {_LEAST_LENGTH} characters, and not of {characters_NL.shape[1]}: "
                f"--text-length {_LEAST_LENGTH}"
            )
        x_NCL = self.conv1(self.embedding(characters_NL).transpose(1, 2))
        x_NCL = _halved(self.layer1(x_NCL))
        x_NCL = _halved(self.layer2(x_NCL))
        x_NCL = self.layer4(_halved(self.layer3(x_NCL)))
        # The largest first, and not in the order of their places: behind a ReLU many are 0, and which of these zeros a
        # backend takes would then decide where the others stand.
        kept = x_NCL.topk(_KEPT, dim=2).values.flatten(1)
        logits: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(kept)))))
        return logits


def _halved(x_NCL: Tensor) -> Tensor:
    return F.max_pool1d(x_NCL, 3, stride=2, padding=1)


def _section(blocks: int, in_channels: int, channels: int, shortcut: bool) -> nn.Sequential:
    first = ConvBlock(in_channels, channels, shortcut)
    return nn.Sequential(first, *(ConvBlock(channels, channels, shortcut) for _ in range(blocks - 1)))


def vdcnn(
    depth: int = 9,
    classes: int = 2,
    shortcut: bool = False,
    width: int = 64,
    hidden: int = 2048,
    vocabulary: int = CharacterInput().vocabulary,
) -> VDCNN:
    """Build a newly initialized VDCNN for texts of any length from 64 characters on.

    Args:
        depth: 9, 17, 29 or 49.
        classes: width of the logits.
        shortcut: whether each block has one, as in ResNet; the paper finds that it helps at depth 49 only.
        width: channels of the first section; the others have 2, 4 and 8 times as many.
        hidden: width of the two linear layers before the last.
        vocabulary: of the character ids, padding and unknown ones included.

    Raises:
        NetworkError: another depth, or a value that no such network has.
    """
    if depth not in BLOCKS:
        raise NetworkError(f"a VDCNN has depth {', '.join(map(str, BLOCKS))}, not {depth}.")
    if min(classes, width, hidden) < 1 or vocabulary < 2:
        raise NetworkError("classes, width and hidden are at least 1, and vocabulary at least 2.")
    return VDCNN(BLOCKS[depth], classes, shortcut, width, hidden, vocabulary)


def _read(weights: Weights) -> list[Reading]:
    needed = {"embedding.weight", "conv1.weight", "fc1.weight", "fc3.weight", "layer4.0.conv2.weight"}
    counts = tuple(block_counts(weights))
    depth = next((depth for depth, blocks in BLOCKS.items() if blocks == counts), None)
    if not needed <= weights.keys() or depth is None or weights["conv1.weight"].dim() != 3:
        return []
    arguments: Arguments = {
        "depth": depth,
        "classes": weights["fc3.weight"].shape[0],
        "shortcut": "layer2.0.shortcut.0.weight" in weights,
        "width": weights["conv1.weight"].shape[0],
        "hidden": weights["fc1.weight"].shape[0],
        "vocabulary": weights["embedding.weight"].shape[0],
    }
    return [Reading(arguments, dict(weights), "embedded characters and one-dimensional convolutions in four sections")]


def _input(arguments: Arguments) -> CharacterInput:
    spec = CharacterInput()
    vocabulary = arguments.get("vocabulary", spec.vocabulary)
    if vocabulary != spec.vocabulary:
        raise NetworkError(
            f"a VDCNN of {vocabulary} character ids: the published alphabet has {spec.vocabulary}, and nothing says "
            "which this one is. Give it in Python: litdeploy.load(…, input=CharacterInput(alphabet=…))."
        )
    return spec


FAMILY = Family(
    "VDCNN",
    vdcnn,
    _read,
    _input,
    layers_per_block=2,
    layers_around=1,
    published=BLOCKS,
    sections=("layer1", "layer2", "layer3", "layer4"),
)
