"""Bundles, reports and recipes that the version 0.1.0 wrote are read, run and measured as they were then.

`fixtures/bundle-0.1.0/README.md` says how the files came about.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from litdeploy.cli import main
from litdeploy.config.recipe import Recipe, read_recipe
from litdeploy.networks import load
from litdeploy.profiler.report.output import read_training
from litdeploy.profiler.report.page import render
from litdeploy.profiler.schema import open_report, read_report
from litdeploy.runtime import open_runner
from litdeploy.storage.bundle import Bundle, read_sidecar

WRITTEN = Path(__file__).parent / "fixtures" / "bundle-0.1.0"
CPU = torch.device("cpu")
TEACHERS = {"classifier": "teacher.safetensors", "generator": "G.ckpt"}

Run = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what was written, with the generator's images beside it, as they were drawn then."""
    folder = tmp_path_factory.mktemp("written") / "0.1.0"
    shutil.copytree(WRITTEN, folder)
    draw = np.random.RandomState(0)
    for domain in ("blue", "green", "red"):
        for split, count in (("train", 8), ("test", 3)):
            place = folder / "domains" / split / domain
            place.mkdir(parents=True)
            for index in range(count):
                coarse = draw.randint(0, 255, (4, 4, 3)).astype(np.uint8)
                Image.fromarray(np.kron(coarse, np.ones((4, 4, 1), np.uint8))).save(place / f"{index}.png")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Run:
    """Runs a command line beside the copy, as the `litdeploy` script does; exit code 0 is asserted."""
    monkeypatch.chdir(folder)

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["litdeploy", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code: object = 0
        except SystemExit as stop:
            code = stop.code
        answer = capsys.readouterr()
        assert code in (0, None), answer.err
        return answer.out

    return call


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _of_then(found: Any, written: Any) -> Any:
    """What was found, without fields that are newer than what was written."""
    if isinstance(found, dict) and isinstance(written, dict):
        return {key: _of_then(value, written[key]) for key, value in found.items() if key in written}
    if isinstance(found, list) and isinstance(written, list):
        return [_of_then(*pair) for pair in zip(found, written, strict=True)]
    return found


@pytest.mark.parametrize("name", TEACHERS)
def test_the_manifest_is_read_and_written_back_with_the_same_content(folder: Path, name: str) -> None:
    bundle = Bundle(folder / name)
    manifest = bundle.read_complete()
    written = _json(bundle.manifest_path)
    assert _of_then(manifest.model_dump(mode="json"), written) == written
    artefact = manifest.artefacts["onnx"]
    assert bundle.artefact_path(artefact) == folder / name / "export" / "student.onnx"
    assert read_sidecar(bundle.artefact_path(artefact)) == artefact


@pytest.mark.parametrize("name", TEACHERS)
def test_the_report_is_read_written_back_and_rendered(folder: Path, name: str) -> None:
    place = folder / name / "profile"
    report = read_report(place)
    assert report is not None
    assert open_report(folder / name) == report
    written = _json(place / "report.json")
    assert _of_then(report.model_dump(mode="json"), written) == written
    page = render(report)
    assert page.startswith("<!doctype html>")
    assert report.student.name in page
    assert [row["epoch"] for row in read_training(folder / name / "metrics.jsonl")] == [1, 2, 3, 4]


def test_the_exported_file_computes_what_the_student_computes(folder: Path) -> None:
    bundle = Bundle(folder / "classifier")
    student = load(bundle.student_path)
    assert student.spec == bundle.read().student
    images_NCHW = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    logits_NK = student.module.eval()(images_NCHW)
    with open_runner("onnxruntime", path=bundle.export_path / "student.onnx", device=CPU) as runner:
        torch.testing.assert_close(runner.run(images_NCHW), logits_NK, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("file", ["", "student.safetensors", "export/student.onnx"])
def test_the_classifier_is_as_accurate_as_it_was(run: Run, file: str) -> None:
    expected = _json(WRITTEN / "classifier" / "manifest.json")["metrics"]["student"]["test"]
    found = json.loads(run("evaluate", Path("classifier", file), "--data", "digits", "--device", "cpu", "--json"))
    assert found.pop("split") == "test"
    assert found.keys() == {"file", *expected}
    assert found["images"] == expected["images"]
    assert found["top1"] == expected["top1"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)


@pytest.mark.parametrize("file", ["", "export/student.onnx"])
def test_the_generator_s_images_are_as_near_to_its_teacher_s_as_they_were(run: Run, file: str) -> None:
    expected = _json(WRITTEN / "generator" / "manifest.json")["metrics"]["student"]["test"]
    found = json.loads(
        run(
            *("evaluate", Path("generator", file), "--data", "domains", "--teacher", "G.ckpt"),
            *("--device", "cpu", "--json"),
        )
    )
    assert found["images"] == expected["images"]
    assert found["psnr"] == pytest.approx(expected["psnr"], abs=1e-3)
    assert found["ssim"] == pytest.approx(expected["ssim"], abs=1e-5)


@pytest.mark.parametrize("name", TEACHERS)
def test_inspect_shows_teacher_student_and_exported_file(run: Run, name: str) -> None:
    manifest = _json(WRITTEN / name / "manifest.json")
    assert _of_then(json.loads(run("inspect", name, "--json")), manifest) == manifest
    shape = ("--input-shape", "3,16,16") if name == "generator" else ()
    teacher = json.loads(run("inspect", TEACHERS[name], *shape, "--json"))
    student = json.loads(run("inspect", f"{name}/student.safetensors", "--json"))
    assert student["plan"] == manifest["student"]["plan"]
    assert teacher["breakdown"]["depth"] > student["breakdown"]["depth"]
    exported = json.loads(run("inspect", f"{name}/export/student.onnx", "--json"))
    details = manifest["artefacts"]["onnx"]["details"]
    described = ("opset", "input", "input_shape", "inputs", "output", "output_shape")
    assert {key: exported[key] for key in described} == {key: details[key] for key in described}
    assert exported["metadata"]["litdeploy"] == "0.1.0"


@pytest.mark.parametrize("name", TEACHERS)
def test_two_reports_side_by_side(run: Run, folder: Path, name: str) -> None:
    report = f"{name}/profile/report.json"
    assert "A: " in run("profile", "--compare", report, name, "--html", f"{name}.html")
    assert (folder / f"{name}.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    found = json.loads(run("profile", "--compare", report, report, "--json"))
    written = _json(WRITTEN / report)
    assert found["a"] == found["b"]
    assert _of_then(found["a"], written) == written


@pytest.mark.slow
def test_the_bundle_is_verified_and_profiled_anew(run: Run, folder: Path) -> None:
    run("verify", "classifier", "--teacher", "teacher.safetensors", "--target", "target.yaml", "--data", "digits")
    before = _json(WRITTEN / "classifier" / "profile" / "report.json")
    run("profile", "classifier", "--teacher", "teacher.safetensors", "--target", "target.yaml")
    after = _json(folder / "classifier" / "profile" / "report.json")
    assert after.keys() >= before.keys()
    assert [(each["runner"], each["batch_size"]) for each in after["measurements"]] == [
        (each["runner"], each["batch_size"]) for each in before["measurements"]
    ]
    shutil.copytree(WRITTEN / "classifier" / "profile", folder / "classifier" / "profile", dirs_exist_ok=True)


def test_the_recipe_in_the_manifest_and_every_key_of_its_file(folder: Path) -> None:
    recipe = Bundle(folder / "classifier").read().recipe
    written = yaml.safe_load((WRITTEN / "recipe.yaml").read_text(encoding="utf-8"))
    assert written.keys() <= Recipe.model_fields.keys()
    assert read_recipe(WRITTEN / "recipe.yaml") == recipe
    assert _of_then(recipe.model_dump(mode="json"), written) == written


@pytest.mark.parametrize(
    "method",
    [
        {"method": "born-again", "born_again": {"generations": 3, "by": "lit"}},
        {
            "method": "indistill",
            "indistill": {
                "student": "resnet20,width=8",
                "share": 0.2,
                "then": "pkt",
                "pkt_weight": 10.0,
                "label_weight": 0.0,
            },
        },
        {"method": "slimming", "slimming": {"sparsity": 1e-5, "prune_ratio": 0.4}},
        {"method": "hint", "hint_share": 0.3, "student_depth": [17, 9], "feature_cache": 2, "compile": "on"},
        {
            "method": "lit",
            "beta": 0.0,
            "parallel": "sections",
            "batch_norm": "synchronised",
            "student_blocks": {"a": 1},
        },
    ],
    ids=lambda method: str(method["method"]),
)
def test_the_settings_of_each_method_keep_their_keys(tmp_path: Path, method: dict[str, Any]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**method, "paper": {"main": {"epochs": 7, "learning_rate": 0.1}}}))
    found = read_recipe(path).model_dump(mode="json")
    assert {key: found[key] for key in method} == method
    assert read_recipe(f"{path}:paper").main.epochs == 7
