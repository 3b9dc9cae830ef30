from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from litdeploy.config.spec import InputSpec, NetworkSpec
from litdeploy.errors import CheckpointError
from litdeploy.networks.families.resnet import resnet
from litdeploy.storage.checkpoint import load_weights, read_checkpoint, write_checkpoint

SPEC = NetworkSpec(name="resnet", arguments={"depth": 8}, input=InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.5,)))


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return resnet(8, in_channels=1).state_dict()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".bin"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict", "net", "ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_every_wrapping_is_taken_off(
    tmp_path: Path, weights: dict[str, torch.Tensor], suffix: str, wrapper: str | None, prefix: str
) -> None:
    content: Any = {prefix + name: tensor for name, tensor in weights.items()}
    if wrapper:
        content = {"epoch": 3, wrapper: content}
    torch.save(content, tmp_path / f"teacher{suffix}")
    found = read_checkpoint(tmp_path / f"teacher{suffix}")
    assert found.weights.keys() == weights.keys()
    assert all(torch.equal(found.weights[name], weights[name]) for name in weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision_is_read_as_float32(
    tmp_path: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    lower = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    torch.save(lower, tmp_path / "a.pt")
    save_file(lower, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        found = read_checkpoint(tmp_path / name).weights
        assert found["conv1.weight"].dtype == torch.float32
        assert torch.equal(found["conv1.weight"], lower["conv1.weight"].float())


def test_the_old_format_and_a_wrapper_inside_a_wrapper(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    torch.save({"model": {"state_dict": weights}}, tmp_path / "a.th", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "a.th").weights.keys() == weights.keys()


def test_written_weights_are_read_back_with_their_spec(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "student.safetensors"
    sha256 = write_checkpoint(path, weights, SPEC)
    found = read_checkpoint(path)
    assert (found.sha256, found.spec) == (sha256, SPEC)
    assert all(torch.equal(found.weights[name], weights[name]) for name in weights)
    assert [entry.name for entry in tmp_path.iterdir()] == ["student.safetensors"]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil-was-here"),))


def _bad_files(folder: Path) -> dict[str, str]:
    """name → what the message must say."""
    good = folder / "good.pt"
    torch.save(nn.Linear(2, 2).state_dict(), good)
    (folder / "empty.pt").touch()
    (folder / "truncated.pt").write_bytes(good.read_bytes()[:300])
    torch.save(nn.Linear(9, 9).state_dict(), good, _use_new_zipfile_serialization=False)
    (folder / "truncated.th").write_bytes(good.read_bytes()[:-100])
    (folder / "text.pt").write_text("not a checkpoint\n" * 10)
    (folder / "text.safetensors").write_text("not a checkpoint\n" * 10)
    (folder / "picture.jpg").write_bytes(b"\xff\xd8")
    torch.save(nn.Linear(2, 2), folder / "module.pt")
    with (folder / "evil.pt").open("wb") as file:
        pickle.dump(Evil(), file)
    torch.save(Evil(), folder / "evil-zip.pt")
    torch.save({"epoch": 3, "lr": 0.1}, folder / "no-weights.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({}, folder / "nothing.pt")
    with zipfile.ZipFile(folder / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"")
    return {
        "absent.pt": "no such file",
        "": "is a folder",
        "empty.pt": "is empty",
        "truncated.pt": "truncated or damaged",
        "truncated.th": "truncated or damaged",
        "text.pt": "not a checkpoint",
        "text.safetensors": "not a whole safetensors file",
        "picture.jpg": "ending '.jpg'",
        "module.pt": "torch.nn.modules.linear.Linear), which runs code",
        "evil.pt": "which runs code",
        "evil-zip.pt": "which runs code",
        "no-weights.pt": "it holds epoch, lr",
        "list.pt": "a list",
        "nothing.pt": "holds nothing",
        "script.pt": "TorchScript",
    }


def test_what_is_no_checkpoint_gets_a_message_and_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, message in _bad_files(tmp_path).items():
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(tmp_path / name)
        assert message in str(caught.value), name
    assert not Path("evil-was-here").exists()


def test_weights_of_another_network_are_named_and_none_is_loaded(weights: dict[str, torch.Tensor]) -> None:
    module = resnet(8, in_channels=1)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    bad = {**weights, "linear.weight": torch.zeros(3, 64), "extra": torch.zeros(1)}
    del bad["conv1.weight"]
    with pytest.raises(CheckpointError) as caught:
        load_weights(module, bad, "teacher.pt", "resnet8")
    message = str(caught.value)
    assert "missing: conv1.weight" in message
    assert "unexpected: extra" in message
    assert "linear.weight: shape (3, 64) in the file, (10, 64) in the network" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_real_published_teacher_is_read_as_it_is(shared: Path) -> None:
    found = read_checkpoint(shared / "teachers" / "cifar10-resnet56.th")
    assert found.weights["conv1.weight"].shape == (16, 3, 3, 3)
    assert all(tensor.device.type == "cpu" for tensor in found.weights.values())


def test_views_of_the_same_bytes_are_not_multiplied(tmp_path: Path) -> None:
    base = torch.zeros(2**18, dtype=torch.float16)
    torch.save({f"a.{start}": base[start:] for start in range(200)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="200 tensors come to"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_safetensors_header_that_claims_more_than_there_is_is_refused(tmp_path: Path) -> None:
    for shape, end in (([10**12], 4 * 10**12), ([2**62, 8], 8)):
        header = json.dumps({"a.b": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
        path = tmp_path / "a.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(CheckpointError, match="not a whole safetensors"):
            read_checkpoint(path)
    path.write_bytes((10**12).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="not a whole safetensors"):
        read_checkpoint(path)


def test_a_tied_weight_is_written_once_and_read_under_all_its_names(tmp_path: Path) -> None:
    table = torch.randn(4, 3)
    weights = {"embedding": table, "head": table, "row": table[1], "empty": torch.zeros(0), "none": torch.zeros(0)}
    path = tmp_path / "tied.safetensors"
    write_checkpoint(path, weights, SPEC)
    found = read_checkpoint(path)
    assert found.spec == SPEC
    assert found.weights.keys() == weights.keys()
    assert all(torch.equal(found.weights[name], weights[name]) for name in weights)
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["embedding", "empty", "none", "row"]
    for made_up in ('{"other": "nothing"}', "[]", "{"):
        metadata = {"litdeploy": SPEC.model_dump_json(), "litdeploy.shared": made_up}
        save_file({"a": table}, path, metadata)
        with pytest.raises(CheckpointError, match="damaged"):
            read_checkpoint(path)
