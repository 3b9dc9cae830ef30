from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litdeploy.errors import RunnerError
from litdeploy.networks import Network
from litdeploy.runtime import open_runner
from litdeploy.storage.staging import sidecar_of

CPU = torch.device("cpu")
IN_A_FRESH_PROCESS = """
import sys
from pathlib import Path
import torch
from litdeploy.runtime import open_runner

batch = torch.load(sys.argv[2])
with open_runner("inductor", path=Path(sys.argv[1]), device=torch.device("cpu")) as runner:
    torch.save(runner.run(batch), sys.argv[3])
print(sorted(name for name in sys.modules if name.startswith(("litdeploy.networks", "litdeploy.exporter", "onnx"))))
"""
WITHOUT_LITDEPLOY = """
import sys
import torch

model = torch._inductor.aoti_load_package(sys.argv[1])
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
print(sorted(name for name in sys.modules if name.startswith("litdeploy")))
"""


@pytest.mark.parametrize("code", [IN_A_FRESH_PROCESS, WITHOUT_LITDEPLOY], ids=["litdeploy", "torch alone"])
def test_a_fresh_process_runs_it_without_the_networks(
    package_path: Path, network: Network, tmp_path: Path, code: str
) -> None:
    torch.save(network.example(5), tmp_path / "batch.pt")
    words = [sys.executable, "-W", "ignore", "-c", code, package_path, tmp_path / "batch.pt", tmp_path / "logits.pt"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    with torch.no_grad():
        expected = network.module(network.example(5))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-4, rtol=1e-4)


def _set(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(sidecar: dict[str, Any]) -> None:
        for key in keys[:-1]:
            sidecar = sidecar[key]
        sidecar[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("versions", "torch", value="2.5.1"), rf"torch 2.5.1, here {torch.__version__.split('+')[0]}"),
        (
            _set("details", "built_for", value={"device": "cuda", "machine": "x86_64", "compute_capability": "9.0"}),
            "device cuda, here cpu; compute capability 9.0, here None",
        ),
        (_set("details", "built_for", "machine", value="riscv64"), "machine riscv64, here "),
        (
            _set("details", "built_for", "features", value=["avx1024_zeta"]),
            "a processor with avx1024_zeta, which this one lacks",
        ),
    ],
)
def test_what_was_built_for_something_else_is_refused(
    package_path: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = tmp_path / "network.pt2"
    path.symlink_to(package_path)
    sidecar = json.loads(sidecar_of(package_path).read_text())
    change(sidecar)
    sidecar_of(path).write_text(json.dumps(sidecar))
    with (
        pytest.raises(RunnerError, match=f"{message}.*Build it here: litdeploy export --aoti"),
        open_runner("inductor", path=path, device=CPU),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("details", "image_shape", value=[1, 10, "10"]), r"not the sidecar of a package \(image_shape.2"),
        (_set("details", "metadata", value=None), r"not the sidecar of a package \(metadata"),
        (_set("details", "built_for", value=3), r"not the sidecar of a package \(built_for"),
        (_set("details", "metadata", "mean", value="[[[1"), "under 'mean' is not a list of numbers"),
    ],
)
def test_a_sidecar_that_says_something_else_is_refused(
    package_path: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = tmp_path / "network.pt2"
    path.symlink_to(package_path)
    sidecar = json.loads(sidecar_of(package_path).read_text())
    change(sidecar)
    sidecar_of(path).write_text(json.dumps(sidecar))
    with pytest.raises(RunnerError, match=message), open_runner("inductor", path=path, device=CPU):
        pass


@pytest.mark.parametrize("cut", [100, 0])
def test_what_was_altered_is_not_opened(package_path: Path, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "network.pt2"
    content = package_path.read_bytes()
    path.write_bytes(content[:-cut] if cut else content + b"0")
    sidecar_of(path).write_bytes(sidecar_of(package_path).read_bytes())
    with (
        pytest.raises(RunnerError, match=r"altered or truncated. It holds code and is not opened"),
        open_runner("inductor", path=path, device=CPU),
    ):
        pass


@pytest.mark.parametrize("sidecar", [None, "not json", "{}"])
def test_without_its_sidecar_it_is_not_opened(package_path: Path, tmp_path: Path, sidecar: str | None) -> None:
    path = tmp_path / "network.pt2"
    path.symlink_to(package_path)
    if sidecar is not None:
        sidecar_of(path).write_text(sidecar)
    with (
        pytest.raises(RunnerError, match=r"network.pt2.json: missing, or not written by"),
        open_runner("inductor", path=path, device=CPU),
    ):
        pass


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(RunnerError, match=r"no such file. Create it: litdeploy export --aoti"),
        open_runner("inductor", path=tmp_path / "none.pt2", device=CPU),
    ):
        pass
