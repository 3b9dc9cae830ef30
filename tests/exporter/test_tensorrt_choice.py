from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from litdeploy.errors import DependencyError, SettingsError
from litdeploy.exporter.formats.tensorrt import choose_library, rtx_capabilities, versions

pytestmark = pytest.mark.tensorrt

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def stands_in(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__version__ = "10.9.0.34"
    return module


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's answers on a machine with an A10."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)


@pytest.fixture
def no_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", stands_in("tensorrt"))


@pytest.mark.usefixtures("rtx")
def test_without_a_gpu_tensorrt_rtx_builds_for_what_is_named() -> None:
    choice = choose_library(CPU, ("8.6", "12.0", "8.6"))
    assert (choice.library, choice.compute_capabilities, choice.gpu) == ("tensorrt_rtx", ("8.6", "12.0"), None)
    assert choice.summary() == (
        f"tensorrt_rtx {choice.version} for compute capability 8.6, 12.0: there is no CUDA GPU here, and tensorrt "
        "builds only on the GPU that runs the engine"
    )
    found = versions(choice)
    assert found["tensorrt_rtx"] == choice.version
    assert found["cuda"].isdecimal()
    assert "driver" not in found


@pytest.mark.usefixtures("rtx")
def test_without_a_gpu_one_must_be_named() -> None:
    with pytest.raises(SettingsError, match=r"Name them: litdeploy export --trt --compute-capability 8\.6,8\.9,12\.0"):
        choose_library(CPU)


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("asked", ["9.0", "86", "sm_86", ""])
def test_a_capability_that_tensorrt_rtx_does_not_build_for_is_refused(asked: str) -> None:
    with pytest.raises(SettingsError, match=r"does not build for it; it builds for .*8\.6, 8\.9, 12\.0") as caught:
        choose_library(CPU, ("8.6", asked))
    assert "https://pypi.nvidia.com" in str(caught.value)


@pytest.mark.usefixtures("rtx")
def test_the_capabilities_that_tensorrt_rtx_builds_for() -> None:
    known = rtx_capabilities()
    assert {"7.5", "8.6", "8.9", "12.0"} <= known.keys()
    assert known["12.0"].name == "SM120"


@pytest.mark.usefixtures("gpu", "tensorrt")
@pytest.mark.parametrize("asked", [(), ("8.6",)])
def test_where_the_library_and_its_gpu_are_tensorrt_builds(asked: tuple[str, ...]) -> None:
    choice = choose_library(CUDA, asked)
    assert (choice.library, choice.version, choice.gpu) == ("tensorrt", "10.9.0.34", "NVIDIA A10")
    assert choice.compute_capabilities == ("8.6",)
    assert choice.reason == "the library and a GPU (NVIDIA A10) are here"


@pytest.mark.usefixtures("rtx", "gpu", "tensorrt")
def test_for_another_gpu_than_the_one_at_hand_tensorrt_rtx_builds() -> None:
    choice = choose_library(CUDA, ("8.6", "8.9"))
    assert (choice.library, choice.compute_capabilities, choice.gpu) == ("tensorrt_rtx", ("8.6", "8.9"), None)
    assert choice.reason == "tensorrt builds only for the GPU at hand, of compute capability 8.6"


@pytest.mark.usefixtures("rtx", "gpu", "no_tensorrt")
def test_without_tensorrt_its_rtx_builds_for_the_gpu_at_hand() -> None:
    choice = choose_library(CUDA)
    assert (choice.library, choice.compute_capabilities, choice.gpu) == ("tensorrt_rtx", ("8.6",), "NVIDIA A10")
    assert choice.reason == "tensorrt is not installed"


@pytest.mark.usefixtures("no_tensorrt", "no_rtx")
def test_without_either_library_it_says_what_to_install_and_from_where(gpu: None) -> None:
    with pytest.raises(DependencyError, match=r"there is no CUDA GPU here.*tensorrt_rtx is not to be had") as caught:
        choose_library(CPU, ("8.6",))
    assert str(caught.value).endswith("Install one: pip install tensorrt-rtx")
    with pytest.raises(DependencyError, match="tensorrt is not installed") as caught:
        choose_library(CUDA)
    assert str(caught.value).endswith("pip install tensorrt --extra-index-url https://pypi.nvidia.com")
