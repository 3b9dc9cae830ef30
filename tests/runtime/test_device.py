from __future__ import annotations

from pathlib import Path

import pytest
import torch

from litdeploy.config.target import Target, read_target
from litdeploy.errors import DeviceError, SettingsError
from litdeploy.runtime import default_target, device_name, resolve_device, resolve_precision, resolve_target

CPU = torch.device("cpu")


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_cuda")
def test_without_cuda() -> None:
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    for text in ("cuda", "cuda:0"):
        with pytest.raises(DeviceError, match="--device cpu"):
            resolve_device(text)
    assert default_target() == read_target("cpu")


@pytest.mark.gpu
def test_with_cuda() -> None:
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", torch.cuda.current_device())
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(DeviceError, match=r"Found: cuda:0 \("):
        resolve_device("cuda:99")
    assert default_target() == read_target("cuda")
    assert device_name(torch.device("cuda", 0)) == torch.cuda.get_device_name(0)


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", ""])
def test_a_device_of_another_name_is_refused(text: str) -> None:
    with pytest.raises(DeviceError, match="auto, cpu, cuda or cuda:0"):
        resolve_device(text)


def test_precision() -> None:
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"
    with pytest.raises(SettingsError, match="auto, fp32 or bf16"):
        resolve_precision("fp16", CPU)


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_bf16": False}, "fp32"), ({}, "fp32")],
)
def test_automatic_precision_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_precision("auto", CPU) == precision


def test_automatic_precision_without_capabilities_is_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert resolve_precision("auto", CPU) == "fp32"


def test_the_processor_has_a_name() -> None:
    assert device_name(CPU).endswith(("thread", "threads"))
    assert not device_name(CPU).startswith(",")


@pytest.mark.usefixtures("no_cuda")
def test_a_target_is_itself_a_name_a_path_or_the_default(tmp_path: Path) -> None:
    own = Target(batch_sizes=(2,))
    path = tmp_path / "own.yaml"
    path.write_text("batch_sizes: [2]\n")
    assert resolve_target(own) is own
    assert resolve_target(path) == resolve_target(str(path)) == own
    assert resolve_target("cuda") == read_target("cuda")
    assert resolve_target(None) == read_target("cpu")
