from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from litdeploy.errors import DependencyError, RunnerError
from litdeploy.runtime.engine import (
    BatchProfile,
    Engine,
    EngineDetails,
    Library,
    Precisions,
    load_library,
    logger_of,
    read_engine,
)
from litdeploy.storage.bundle import sidecar_of
from litdeploy.storage.records import Artefact


def checked(engine: Engine, version: str = "10.9.0.34", capability: str = "8.6", **changes: object) -> None:
    details = engine.details.model_copy(update=changes)
    Engine(engine.path, engine.content, engine.artefact, details).check(version, capability)


def test_an_engine_is_read_with_what_its_sidecar_says(engine_path: Path) -> None:
    engine = read_engine(engine_path)
    assert engine.content == engine_path.read_bytes()
    assert engine.version == "10.9.0.34"
    assert engine.details.batches == BatchProfile(min=1, opt=8, max=64)
    assert engine.details.compute_capabilities == ("8.6",)


def test_what_an_exporter_adds_to_the_details_does_no_harm(engine_path: Path) -> None:
    sidecar = sidecar_of(engine_path)
    artefact = Artefact.model_validate_json(sidecar.read_bytes())
    added = artefact.model_copy(update={"details": {**artefact.details, "parity": {"within": True}}})
    sidecar.write_text(added.model_dump_json())
    assert read_engine(engine_path).artefact == added


@pytest.mark.parametrize("content", [b"", b"another engine", b"an engin"])
def test_an_engine_that_was_altered_or_cut_short_is_refused(engine_path: Path, content: bytes) -> None:
    engine_path.write_bytes(content)
    with pytest.raises(RunnerError, match="SHA-256 differs") as caught:
        read_engine(engine_path)
    assert str(caught.value).endswith("Build it again: litdeploy export deploy --trt")


def test_an_engine_without_its_sidecar_is_refused(engine_path: Path) -> None:
    sidecar_of(engine_path).unlink()
    with pytest.raises(RunnerError, match=r"its sidecar student\.engine\.json is missing"):
        read_engine(engine_path)
    engine_path.unlink()
    with pytest.raises(RunnerError, match=r"no such file\. Create it: litdeploy export --trt"):
        read_engine(engine_path)


@pytest.mark.parametrize("key", ["library", "batches", "onnx_sha256"])
def test_a_sidecar_of_something_else_is_refused(engine_path: Path, key: str) -> None:
    sidecar = sidecar_of(engine_path)
    content = json.loads(sidecar.read_text())
    del content["details"][key]
    sidecar.write_text(json.dumps(content))
    with pytest.raises(RunnerError, match=f"not the sidecar of an engine \\({key}: Field required\\)"):
        read_engine(engine_path)
    for broken in ("", "[]", '{"path": "x"}', sidecar.read_text()[:-20]):
        sidecar.write_text(broken)
        with pytest.raises(RunnerError, match="not the sidecar of an engine"):
            read_engine(engine_path)


def test_a_sidecar_without_the_library_version_is_refused(engine_path: Path) -> None:
    sidecar = sidecar_of(engine_path)
    content = json.loads(sidecar.read_text())
    content["versions"] = {"torch": "2"}
    sidecar.write_text(json.dumps(content))
    with pytest.raises(RunnerError, match="KeyError: 'tensorrt'"):
        read_engine(engine_path)


def test_another_version_says_what_differs_and_what_to_type(engine_path: Path) -> None:
    engine = read_engine(engine_path)
    checked(engine)
    with pytest.raises(RunnerError, match=r"built by tensorrt 10\.9\.0\.34, but 10\.13\.0\.35 is installed") as caught:
        checked(engine, version="10.13.0.35")
    assert "Build it again: litdeploy export deploy --trt" in str(caught.value)
    assert "pip install tensorrt==10.9.0.34" in str(caught.value)


@pytest.mark.parametrize(
    ("version", "serves"), [("10.9.0.34", True), ("10.13.0.35", True), ("10.8.0.43", False), ("11.0.0.1", False)]
)
def test_a_version_compatible_engine_runs_in_later_versions(engine_path: Path, version: str, serves: bool) -> None:
    engine = read_engine(engine_path)
    if serves:
        checked(engine, version=version, version_compatible=True)
    else:
        with pytest.raises(RunnerError, match="is installed"):
            checked(engine, version=version, version_compatible=True)


def test_another_gpu_says_what_differs_and_what_to_type(engine_path: Path) -> None:
    engine = read_engine(engine_path)
    with pytest.raises(RunnerError, match=r"compute capability 8\.6 \(A10\), but this GPU has 9\.0") as caught:
        checked(engine, capability="9.0")
    assert str(caught.value).endswith("Build an engine on this machine: litdeploy export --trt")
    checked(engine, capability="9.0", compute_capabilities=("8.6", "9.0"))
    checked(engine, capability="9.0", hardware_compatibility="ampere-plus")
    for level, capability in (("ampere-plus", "7.5"), ("same-compute-capability", "8.9")):
        with pytest.raises(RunnerError, match="this GPU has"):
            checked(engine, capability=capability, hardware_compatibility=level)


def test_a_profile_has_the_smallest_the_middle_and_the_largest_batch() -> None:
    assert BatchProfile.of((64, 1, 8)) == BatchProfile(min=1, opt=8, max=64)
    assert BatchProfile.of((1, 8, 64, 256)) == BatchProfile(min=1, opt=8, max=256)
    assert BatchProfile.of((4,)) == BatchProfile(min=4, opt=4, max=4)
    for sizes in ((0, 1, 2), (2, 1, 3), (1, 4, 3)):
        with pytest.raises(ValidationError):
            BatchProfile(min=sizes[0], opt=sizes[1], max=sizes[2])


def test_shares_are_told_in_one_line() -> None:
    found = Precisions(source="network", layers={"fp16": 0.933, "fp32": 0.067}, weights={"fp16": 1.0})
    assert found.summary() == "layers: 93.3 % fp16, 6.7 % fp32; weights: 100.0 % fp16 (as the network requires)"


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("tensorrt", "pip install tensorrt --extra-index-url https://pypi.nvidia.com"),
        ("tensorrt_rtx", r"pip install tensorrt-rtx"),
    ],
)
def test_a_library_that_is_missing_says_which_index_has_it(
    monkeypatch: pytest.MonkeyPatch, name: Library, command: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DependencyError, match=f"{name} is required but cannot be imported.*Install it: {command}"):
        load_library(name)


@pytest.mark.tensorrt
def test_the_logger_keeps_errors_and_drops_what_the_missing_driver_adds() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    log = logger_of("tensorrt_rtx")
    assert log is logger_of("tensorrt_rtx")
    log.errors.clear()
    severity = trt.ILogger.Severity
    for kind, message in (
        (severity.ERROR, "wrong"),
        (severity.INTERNAL_ERROR, "very wrong"),
        (severity.WARNING, "odd"),
        (severity.ERROR, "[checkMacros.cpp::catchCudaError::250] no driver"),
    ):
        log.log(kind, message)
    assert log.errors == ["wrong", "very wrong"]
    log.errors.clear()


def test_details_survive_their_sidecar(engine_path: Path) -> None:
    details = read_engine(engine_path).details
    assert EngineDetails.model_validate_json(details.model_dump_json()) == details


@pytest.mark.parametrize("version", ["10.9; rm -rf ~", "ten", "", "1" * 5000])
def test_a_version_that_is_none_is_not_shown_as_what_to_install(engine_path: Path, version: str) -> None:
    sidecar = sidecar_of(engine_path)
    content = json.loads(sidecar.read_text())
    content["versions"] = {content["details"]["library"]: version}
    sidecar.write_text(json.dumps(content))
    with pytest.raises(RunnerError, match="not the sidecar of an engine"):
        read_engine(engine_path)
