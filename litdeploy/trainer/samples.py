"""The sample sheet of a generator: a few images in every domain, the teacher's above the student's, as one PNG.

Shape suffixes: N images, K domains, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from litdeploy.config.spec import TranslationInput
from litdeploy.data import Split, as_vectors, normalise
from litdeploy.files import write_whole
from litdeploy.networks.batch import forward

_IMAGES = 6
_LEAST_PIXELS = 64  # of an image on the sheet; smaller ones are enlarged by a whole factor
_GAP, _HEAD, _SIDE = 2, 18, 56
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


def write_samples(
    path: Path, teacher: nn.Module, student: nn.Module, split: Split, spec: TranslationInput, domains: Sequence[str]
) -> bool:
    """Writes the sheet: a column for the input and one for each domain, two rows an image.

    Of attributes a column shows the image with that one turned over, and the others as they are.

    Args:
        teacher, student: in eval mode, on the split's device.
        split: images evenly spaced over it are shown.
        domains: their names.

    Returns:
        Whether there is Pillow, which draws it; without, nothing is written.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        return False
    count = min(_IMAGES, len(split))
    [picked] = split.pick([torch.arange(count) * len(split) // count])
    images_NCHW = normalise(picked.images(), spec.images)
    rows = []
    for network in (teacher, student):
        columns = [
            images_NCHW,
            *(_translated(network, images_NCHW, wanted) for wanted in _wanted(picked.labels_N, spec)),
        ]
        rows.append([_pixels(column, spec) for column in columns])
    _, height, width = spec.images.shape
    factor = max(1, -(-_LEAST_PIXELS // min(height, width)))
    cell_h, cell_w = height * factor + _GAP, width * factor + _GAP
    sheet = Image.new("RGB", (_SIDE + cell_w * len(rows[0]), _HEAD + 2 * cell_h * count), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(("input", *domains)):
        pen.text((_SIDE + cell_w * column + 2, 3), name[: cell_w // 7], fill=_INK)
    for index in range(count):
        for role, (label, columns) in enumerate(zip(("teacher", "student"), rows, strict=True)):
            top = _HEAD + cell_h * (2 * index + role)
            pen.text((4, top + cell_h // 2 - 6), label, fill=_INK)
            for column, pixels_NHWC in enumerate(columns):
                tile = Image.fromarray(pixels_NHWC[index].numpy()).resize((width * factor, height * factor), 0)
                sheet.paste(tile, (_SIDE + cell_w * column, top))
    with write_whole(path) as temporary:
        sheet.save(temporary, "png")
    return True


def _wanted(labels: Tensor, spec: TranslationInput) -> list[Tensor]:
    """For each domain, what the images shall be: float32 (N, K)."""
    own_NK = as_vectors(labels, spec.domains)
    if labels.dim() == 1:
        return [torch.eye(spec.domains, device=labels.device)[each].expand_as(own_NK) for each in range(spec.domains)]
    turned = []
    for each in range(spec.domains):
        wanted_NK = own_NK.clone()
        wanted_NK[:, each] = 1 - wanted_NK[:, each]
        turned.append(wanted_NK)
    return turned


@torch.no_grad()
def _translated(network: nn.Module, images_NCHW: Tensor, wanted_NK: Tensor) -> Tensor:
    translated: Tensor = forward(network, {"images": images_NCHW, "domains": wanted_NK})
    return translated


def _pixels(images_NCHW: Tensor, spec: TranslationInput) -> Tensor:
    """RGB, uint8 (N, H, W, 3), on the CPU."""
    mean_C11, std_C11 = (
        torch.tensor(values, device=images_NCHW.device).view(-1, 1, 1) for values in (spec.images.mean, spec.images.std)
    )
    values_NCHW = (255 * (images_NCHW.float() * std_C11 + mean_C11)).round().clamp(0, 255).to(torch.uint8)
    if spec.images.shape[0] == 1:
        values_NCHW = values_NCHW.expand(-1, 3, -1, -1)
    return values_NCHW.permute(0, 2, 3, 1).cpu().contiguous()
