from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from litdeploy.config.spec import InputSpec, TranslationInput
from litdeploy.data import Split
from litdeploy.data.split import Resident
from litdeploy.networks import load
from litdeploy.networks.families.stargan import stargan
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Likeness
from litdeploy.trainer.samples import write_samples

SPEC = TranslationInput(images=InputSpec(shape=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3), domains=2)


def _split(labels: torch.Tensor) -> Split:
    generator = torch.Generator().manual_seed(0)
    return Resident(torch.randint(256, (len(labels), 3, 16, 16), generator=generator, dtype=torch.uint8), labels)


class _Shows(torch.nn.Module):
    """Gives an image that is white where the first domain is wanted and grey where the second is."""

    def forward(self, images: torch.Tensor, domains: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(images) + domains[:, :1, None, None]


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as sheet:
        return np.asarray(sheet)


def test_the_teachers_row_is_above_the_students_and_each_column_a_domain(tmp_path: Path) -> None:
    split = _split(torch.tensor([0, 1, 0]))
    torch.manual_seed(0)
    teacher, student = stargan(2, 2, 2).eval(), _Shows().eval()
    assert write_samples(tmp_path / "sheet.png", teacher, student, split, SPEC, ("first", "second"))
    pixels = _read(tmp_path / "sheet.png")
    cell, side, head = 16 * 4 + 2, 56, 18
    assert pixels.shape == (head + 2 * 3 * cell, side + 3 * cell, 3)

    def tile(row: int, column: int) -> np.ndarray:
        top, left = head + row * cell, side + column * cell
        return pixels[top : top + 64 : 4, left : left + 64 : 4]

    [picked] = split.pick([torch.arange(3)])
    stored = picked.images().permute(0, 2, 3, 1).numpy()
    assert np.abs(tile(2, 0).astype(int) - stored[1]).max() <= 1
    assert (tile(3, 0) == tile(2, 0)).all()
    assert (tile(1, 1) == 255).all()
    assert (tile(1, 2) == 128).all()
    with torch.no_grad():
        images = torch.from_numpy(stored).permute(0, 3, 1, 2).float() / 127.5 - 1
        made = teacher(images, torch.tensor([[0.0, 1.0]]).expand(3, 2))[2]
    assert np.abs(tile(4, 2) - (127.5 * (made + 1)).permute(1, 2, 0).numpy()).max() < 1


def test_an_attribute_is_turned_over(tmp_path: Path) -> None:
    split = _split(torch.tensor([[1, 0], [0, 0]]))
    write_samples(tmp_path / "sheet.png", _Shows(), _Shows(), split, SPEC, ("first", "second"))
    pixels = _read(tmp_path / "sheet.png")
    shown = [int(pixels[18 + 66 * row + 5, 56 + 66 * column + 5, 0]) for row in (0, 2) for column in (1, 2)]
    assert shown == [128, 255, 255, 128]


def test_a_run_leaves_a_sheet_and_the_likeness_to_the_teacher(generator_bundle: Bundle) -> None:
    manifest = generator_bundle.read_complete()
    with Image.open(generator_bundle.samples_path) as sheet:
        assert sheet.size == (56 + 4 * 66, 18 + 12 * 66)
    assert manifest.metrics["teacher"] == {}
    found = manifest.metrics["student"]
    assert all(isinstance(found[split], Likeness) for split in ("validation", "test"))
    assert manifest.student.plan == {"blocks": (0, 2)}
    assert manifest.student.classes == ("blue", "green", "red")


def test_lit_leaves_stem_and_head_and_the_discriminator_moves_them(generator_bundle: Bundle) -> None:
    rows = generator_bundle.metrics_path.read_text().splitlines()
    assert [name in rows[0] for name in ("section/blocks", "validation_psnr")] == [True, True]
    assert [name in rows[-1] for name in ("adversarial", "domain", "cycle")] == [True] * 3
    manifest = generator_bundle.read_complete()
    teacher = load(manifest.teacher.path, input=manifest.teacher.spec.input)
    student = load(generator_bundle.student_path)
    assert len(student.module.blocks) == 2
    before, after = (each.module.stem[0].weight for each in (teacher, student))
    # Four steps of Adam at 1e-4 move no weight by more than that each.
    assert 0 < (after - before).abs().max().item() <= 5e-4


def test_without_pillow_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert not write_samples(tmp_path / "sheet.png", _Shows(), _Shows(), _split(torch.tensor([0])), SPEC, ("a", "b"))
    assert not (tmp_path / "sheet.png").exists()
