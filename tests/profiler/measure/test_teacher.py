from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from litdeploy.exporter.teacher import load_teacher
from litdeploy.networks import Network
from litdeploy.profiler.measure import teacher as module
from litdeploy.profiler.measure.teacher import teacher_onnx
from tests.profiler.conftest import Made


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The operator sets that were exported, one an export."""
    done: list[int] = []

    def export_onnx(network: Network, path: Path, opset: int) -> dict[str, object]:
        done.append(opset)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"export {len(done)}".encode())
        return {}

    monkeypatch.setattr(module, "export_onnx", export_onnx)
    return done


def _torn(onnx: Path) -> None:
    onnx.write_bytes(b"torn")


def _torn_sidecar(onnx: Path) -> None:
    onnx.with_suffix(".json").write_text("{")


def _gone(onnx: Path) -> None:
    onnx.unlink()


def test_a_teacher_is_exported_once(made: Made, exports: list[int]) -> None:
    teacher = load_teacher(made.bundle, made.bundle.read(), None, None)
    paths = [teacher_onnx(made.bundle, teacher, "0f" * 32, opset=20) for _ in range(2)]
    assert paths == [made.bundle.profile_path / "teacher.onnx"] * 2
    assert exports == [20]


@pytest.mark.parametrize("happens", [_torn, _torn_sidecar, _gone])
def test_and_again_where_the_file_is_not_whole(made: Made, exports: list[int], happens: Callable[[Path], None]) -> None:
    teacher = load_teacher(made.bundle, made.bundle.read(), None, None)
    happens(teacher_onnx(made.bundle, teacher, "0f" * 32, opset=20))
    teacher_onnx(made.bundle, teacher, "0f" * 32, opset=20)
    assert exports == [20, 20]


@pytest.mark.parametrize(("sha256", "opset"), [("1e" * 32, 20), ("0f" * 32, 19)])
def test_and_again_where_it_is_of_something_else(made: Made, exports: list[int], sha256: str, opset: int) -> None:
    teacher = load_teacher(made.bundle, made.bundle.read(), None, None)
    teacher_onnx(made.bundle, teacher, "0f" * 32, opset=20)
    teacher_onnx(made.bundle, teacher, sha256, opset=opset)
    assert exports == [20, opset]
