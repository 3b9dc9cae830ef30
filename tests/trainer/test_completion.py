from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from litdeploy.errors import InterruptedRun
from litdeploy.networks import load
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Likeness
from litdeploy.trainer import Progress, compress
from tests.trainer.test_compress import QUICK


class Stopped(Progress):
    """Interrupts when the second epoch begins."""

    def on_train_epoch_start(self, phase: str, epoch: int, epochs: int, samples: int, done: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt


def test_an_interrupted_run_says_so_and_keeps_its_weights(teacher_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun, match="after 1 of 2 epochs"):
        compress(teacher_path, out=tmp_path / "deploy", progress=Stopped(), **QUICK)
    bundle = Bundle(tmp_path / "deploy")
    manifest = bundle.read()
    assert (manifest.status, manifest.run.epochs) == ("interrupted", 1)
    assert "test" not in manifest.metrics["student"]
    assert load(bundle.student_path).class_count() == 10


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
    assert [name in rows[1] for name in ("section/blocks", "validation_psnr")] == [True, True]
    assert [name in rows[-1] for name in ("adversarial", "domain", "cycle")] == [True] * 3
    manifest = generator_bundle.read_complete()
    teacher = load(manifest.teacher.path, input=manifest.teacher.spec.input)
    student = load(generator_bundle.student_path)
    assert len(student.module.blocks) == 2
    before, after = (each.module.stem[0].weight for each in (teacher, student))
    # Four steps of Adam at 1e-4 move no weight by more than that each.
    assert 0 < (after - before).abs().max().item() <= 5e-4
