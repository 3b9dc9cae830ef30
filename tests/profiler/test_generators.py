"""A generator's profile: what stands in the place of accuracy, in the report and in all that is made of it."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from litdeploy.config.target import Target, Timing
from litdeploy.errors import BundleError, GateError
from litdeploy.profiler import Report, check_gates, compare_reports, predict, profile
from litdeploy.profiler.report.diff_page import render_diff
from litdeploy.profiler.report.output import to_csv, write_report
from litdeploy.profiler.report.page import render
from litdeploy.profiler.report.tables import sizes
from litdeploy.profiler.schema import open_report
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import MOST_DB, Likeness

TARGET = Target(
    device="cpu", runners=("eager",), batch_sizes=(1,), timing=Timing(warmup_ms=1, samples=8, max_seconds=1)
)


@pytest.fixture(scope="module")
def profiled(generator_bundle: Bundle) -> Report:
    return profile(generator_bundle, target=TARGET)


def test_the_report_has_the_likeness_of_its_images(profiled: Report, generator_bundle: Bundle) -> None:
    metrics = generator_bundle.read().metrics
    assert (profiled.teacher.accuracy, profiled.teacher.likeness, profiled.student.accuracy) == ({}, {}, {})
    assert profiled.student.likeness == metrics["student"]
    test = metrics["student"]["test"]
    assert f"a PSNR of {test.psnr:.1f} dB and an SSIM of {test.ssim:.4f} to the teacher's (test" in profiled.verdict
    assert profiled.test_used_once
    assert (profiled.teacher.name, profiled.student.name) == ("StarGAN-12", "StarGAN-10")
    assert open_report(generator_bundle.path) == profiled
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in sizes(profiled).rows}
    assert rows["PSNR to the teacher, test"] == ["–", f"{test.psnr:.1f} dB", "–"]
    assert rows["SSIM to the teacher, test"] == ["–", f"{test.ssim:.4f}", "–"]


def test_the_sections_fidelity_ends_with_the_images(profiled: Report) -> None:
    found = profiled.fidelity
    assert found is not None
    assert [each.name for each in found.deviations] == ["stem", "blocks", "images"]
    assert (found.same_class_on_teacher, found.same_class_on_own) == (None, None)
    assert all(each.on_own is not None and 0 < each.on_own < 2 for each in found.deviations)


def test_the_page_shows_the_sheet_and_no_accuracy(profiled: Report, generator_bundle: Bundle) -> None:
    page = (generator_bundle.profile_path / "report.html").read_text(encoding="utf-8")
    sheet = generator_bundle.samples_path.read_bytes()
    assert base64.b64encode(sheet).decode() in page
    assert "Size and likeness" in page
    assert "Validation PSNR" in page
    assert "predicts the teacher’s class" not in page
    assert "Accuracy" not in page
    assert "<img" not in render(profiled)


def test_what_is_no_png_is_not_in_the_page(generator_bundle: Bundle, profiled: Report, tmp_path: Path) -> None:
    (tmp_path / "samples.png").write_bytes(b"<script>")
    (tmp_path / "profile").mkdir()
    write_report(profiled, (), tmp_path / "profile")
    assert "<img" not in (tmp_path / "profile" / "report.html").read_text(encoding="utf-8")


def test_a_gate_on_accuracy_says_that_there_is_none(profiled: Report) -> None:
    with pytest.raises(GateError, match="--max-accuracy-drop 1: StarGAN-10 makes images, which have no accuracy"):
        check_gates(profiled, max_accuracy_drop=1)


def test_two_reports_are_held_side_by_side_and_written_as_csv(profiled: Report, generator_bundle: Bundle) -> None:
    page = render_diff(compare_reports(generator_bundle.path, generator_bundle.path))
    assert page.count(profiled.student.likeness["test"].summary()) >= 2
    assert "Neither report has an accuracy" not in page
    head, *lines = to_csv([profiled]).splitlines()
    assert len(lines) == 2
    assert "accuracy" not in head


def test_students_of_a_generator_are_predicted(generator_files: Path) -> None:
    found = predict(generator_files / "G.ckpt", (8, 10), target=TARGET, input_shape=(3, 16, 16))
    assert [(each.name, each.plan) for each in found.students] == [
        ("StarGAN-8", {"blocks": (0,)}),
        ("StarGAN-10", {"blocks": (0, 2)}),
    ]
    assert all(len(each.measurements) == 1 and not each.failures for each in found.students)


@pytest.mark.parametrize("psnr", ["1e9", "NaN", "null"])
def test_a_likeness_that_cannot_be_is_no_report(
    psnr: str, profiled: Report, generator_bundle: Bundle, tmp_path: Path
) -> None:
    told = profiled.student.likeness["test"].psnr
    for source, read in (
        (generator_bundle.profile_path / "report.json", open_report),
        (generator_bundle.manifest_path, lambda path: Bundle(path.parent).read()),
    ):
        text = source.read_text()
        assert str(told) in text
        broken = tmp_path / source.name
        broken.write_text(text.replace(str(told), psnr))
        with pytest.raises(BundleError, match="psnr"):
            read(broken)


def test_the_ends_of_the_scale() -> None:
    for psnr, ssim in ((MOST_DB, 1), (-MOST_DB, -1)):
        assert Likeness(psnr=psnr, ssim=ssim, images=1).psnr == psnr
