from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from litdeploy.batch import Batch
from litdeploy.config.spec import InputSpec, TranslationInput
from litdeploy.errors import DataError
from litdeploy.networks.families.stargan import stargan
from litdeploy.storage.records import MOST_DB, Likeness
from litdeploy.tasks import TASKS
from litdeploy.tasks.translation import as_vectors, likeness_of, others, ssim, swapped

HALF = InputSpec(shape=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
SPEC = TranslationInput(images=HALF, domains=2)
TRANSLATION = TASKS["translation"]


def _plain_ssim(x_HW: np.ndarray, y_HW: np.ndarray) -> float:
    """Wang et al., 2004, window by window."""
    places = np.arange(11) - 5
    line = np.exp(-(places**2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    found = []
    for top in range(x_HW.shape[0] - 10):
        for left in range(x_HW.shape[1] - 10):
            x, y = (image[top : top + 11, left : left + 11] for image in (x_HW, y_HW))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            c1, c2 = 0.01**2, 0.03**2
            found.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


def test_both_are_as_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, 3, 16, 13, generator=generator) * 2 - 1 for _ in range(2))
    unit_x, unit_y = ((images.double().numpy() + 1) / 2 for images in (x, y))
    found = likeness_of(x, y, HALF)
    expected = np.mean([_plain_ssim(unit_x[n, c], unit_y[n, c]) for n in range(2) for c in range(3)])
    assert found.ssim == pytest.approx(expected, abs=1e-9)
    assert found.psnr == pytest.approx(10 * math.log10(1 / ((unit_x - unit_y) ** 2).mean()))


def test_in_batches_it_is_the_same_as_at_once() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(5, 3, 16, 16, generator=generator) for _ in range(2))
    answers = {"x": iter(x.split(2)), "y": iter(y.split(2))}
    batches = [(batch, torch.zeros(len(batch))) for batch in x.split(2)]
    found = TRANSLATION.evaluate(lambda _: next(answers["y"]), batches, SPEC, lambda _: next(answers["x"]))
    at_once = likeness_of(x, y, HALF)
    assert (found.psnr, found.ssim) == (pytest.approx(at_once.psnr), pytest.approx(at_once.ssim))
    assert found.images == 5


def test_equal_images_and_images_smaller_than_the_window() -> None:
    x = torch.rand(1, 3, 6, 8)
    assert likeness_of(x, x, HALF).psnr == MOST_DB
    assert ssim(x, x, HALF).item() == pytest.approx(1)


def test_no_images_are_refused() -> None:
    with pytest.raises(DataError, match="split is empty"):
        TRANSLATION.evaluate(lambda batch: torch.empty(0), [], SPEC, lambda batch: torch.empty(0))


def test_exclusive_domains_and_attributes_become_vectors() -> None:
    assert as_vectors(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert as_vectors(torch.tensor([[1, 1, 0]]), 3).tolist() == [[1, 1, 0]]


def test_training_keeps_the_labels_share_and_measuring_goes_through_all_other_domains() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    assert sorted(swapped(labels).tolist()) == labels.tolist()
    targets = others(labels, 3)
    assert (targets != labels).all()
    assert targets.tolist() == [1, 2, 1, 0, 2, 0, 0]
    # In parts, the same as at once.
    assert torch.equal(torch.cat([others(labels[:3], 3), others(labels[3:], 3, first=3)]), targets)


def test_attributes_are_those_of_another_image() -> None:
    labels = torch.tensor([[1, 0], [0, 1], [1, 1]])
    assert others(labels, 2).tolist() == [[1, 1], [1, 0], [0, 1]]


class _Shows(torch.nn.Module):
    """Gives an image that is white where the first domain is wanted and grey where the second is."""

    def forward(self, images: torch.Tensor, domains: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(images) + domains[:, :1, None, None]


def _samples(labels: torch.Tensor) -> tuple[np.ndarray, Batch]:
    """Pixels (N, H, W, C), and what a network takes of them."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(256, (len(labels), 3, 16, 16), generator=generator, dtype=torch.uint8)
    return stored.permute(0, 2, 3, 1).numpy(), TRANSLATION.inputs(stored.float() / 127.5 - 1, labels, SPEC)


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as sheet:
        return np.asarray(sheet)


def test_the_teachers_row_is_above_the_students_and_each_column_a_domain(tmp_path: Path) -> None:
    labels = torch.tensor([0, 1, 0])
    stored, inputs = _samples(labels)
    torch.manual_seed(0)
    teacher, student = stargan(2, 2, 2).eval(), _Shows().eval()
    path = tmp_path / "sheet.png"
    assert TRANSLATION.write_samples(path, teacher, student, inputs, labels, SPEC, ("first", "second"))
    pixels = _read(path)
    cell, side, head = 16 * 4 + 2, 56, 18
    assert pixels.shape == (head + 2 * 3 * cell, side + 3 * cell, 3)

    def tile(row: int, column: int) -> np.ndarray:
        top, left = head + row * cell, side + column * cell
        return pixels[top : top + 64 : 4, left : left + 64 : 4]

    assert np.abs(tile(2, 0).astype(int) - stored[1]).max() <= 1
    assert (tile(3, 0) == tile(2, 0)).all()
    assert (tile(1, 1) == 255).all()
    assert (tile(1, 2) == 128).all()
    with torch.no_grad():
        images = torch.from_numpy(stored).permute(0, 3, 1, 2).float() / 127.5 - 1
        made = teacher(images, torch.tensor([[0.0, 1.0]]).expand(3, 2))[2]
    assert np.abs(tile(4, 2) - (127.5 * (made + 1)).permute(1, 2, 0).numpy()).max() < 1


def test_an_attribute_is_turned_over(tmp_path: Path) -> None:
    labels, path = torch.tensor([[1, 0], [0, 0]]), tmp_path / "sheet.png"
    _, inputs = _samples(labels)
    TRANSLATION.write_samples(path, _Shows(), _Shows(), inputs, labels, SPEC, ("first", "second"))
    pixels = _read(path)
    shown = [int(pixels[18 + 66 * row + 5, 56 + 66 * column + 5, 0]) for row in (0, 2) for column in (1, 2)]
    assert shown == [128, 255, 255, 128]


def test_without_pillow_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    labels, path = torch.tensor([0]), tmp_path / "sheet.png"
    _, inputs = _samples(labels)
    assert not TRANSLATION.write_samples(path, _Shows(), _Shows(), inputs, labels, SPEC, ("a", "b"))
    assert not path.exists()


def test_a_report_has_the_likeness_to_the_teacher_alone() -> None:
    student = {"validation": Likeness(psnr=30.0, ssim=0.9, images=4), "test": Likeness(psnr=31.24, ssim=0.95, images=8)}
    assert TRANSLATION.headline({}, student) == ("Likeness", "31.2 dB", "PSNR, SSIM 0.9500, test")
    assert TRANSLATION.verdict({}, student) == (
        "; its images have a PSNR of 31.2 dB and an SSIM of 0.9500 to the teacher's (test split)"
    )
    assert [row.label for row in TRANSLATION.rows({}, student)] == [
        f"{name} to the teacher, {split}" for split in ("test", "validation") for name in ("PSNR", "SSIM")
    ]
    assert TRANSLATION.points(student["validation"], student["test"]) is None
