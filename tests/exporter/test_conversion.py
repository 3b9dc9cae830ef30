from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from litdeploy.config.spec import InputSpec, NetworkSpec
from litdeploy.config.target import Precision
from litdeploy.errors import NetworkError
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.exporter.precision import SAFE_SHARE, convert
from litdeploy.networks import Network
from litdeploy.runtime import open_runner

CPU = torch.device("cpu")
LARGE = 2.0**18


class Overflows(nn.Module):
    """Its middle is beyond fp16: in a layer, and in a sum that is written in `forward`."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.large = nn.Conv2d(8, 8, 1)
        self.small = nn.Conv2d(8, 8, 1)
        self.last = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        kept = self.first(images)
        large = self.large(kept) * self.factor
        normal = self.small((large + kept) / self.factor)
        logits: Tensor = self.last(normal.mean((2, 3)))
        return logits


def made(student: Network, module: nn.Module) -> Network:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return Network(module.eval(), student.spec, "mine")


def logits(network: Network, path: Path, precision: Precision, batches: list[Tensor]) -> Tensor:
    export_onnx(network, path, None, conversion=convert(network, precision, batches))
    with open_runner("onnxruntime", path=path, device=CPU) as runner:
        return runner.run(batches[0])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_network_that_fits_is_converted_whole(student: Network, precision: Precision) -> None:
    batches = [student.example(8), 3 * student.example(8)]
    found = convert(student, precision, batches)
    assert found.kept == ("linear",)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    for name, parameter in found.module.named_parameters():
        assert parameter.dtype == (torch.float32 if ".linear." in name else dtype), name
    assert {parameter.dtype for parameter in student.module.parameters()} == {torch.float32}
    largest = []
    handles = [
        module.register_forward_hook(lambda *given: largest.append(given[2].abs().max().item()))
        for module in student.module.modules()
    ]
    with torch.no_grad():
        for batch in batches:
            student.module(batch)
    for handle in handles:
        handle.remove()
    # Outputs of the convolutions are not there once the batch norms are folded.
    assert 0 < found.largest <= max(largest)
    assert found.largest_layer in dict(student.module.named_modules())


def test_what_overflows_stays_in_fp32_and_the_logits_are_right(student: Network, tmp_path: Path) -> None:
    network = made(student, Overflows(LARGE))
    batches = [student.example(8)]
    found = convert(network, "fp16", batches)
    assert found.largest > torch.finfo(torch.float16).max
    assert found.kept == ("", "last")
    with torch.no_grad():
        expected = network.module(batches[0])
    result = logits(network, tmp_path / "network.onnx", "fp16", batches)
    torch.testing.assert_close(result, expected, atol=0.02, rtol=0.02)
    types = {tensor.data_type for tensor in onnx.load_model(tmp_path / "network.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types


def test_a_layer_that_overflows_keeps_its_weights(student: Network) -> None:
    network = made(student, Overflows(1.0))
    module = network.module
    assert isinstance(module, Overflows)
    with torch.no_grad():
        module.large.weight.mul_(LARGE)
    found = convert(network, "fp16", [student.example(8)])
    assert found.kept[0] == "large"
    types = {name: parameter.dtype for name, parameter in found.module.named_parameters()}
    assert types["module.large.weight"] == torch.float32
    assert types["module.first.weight"] == torch.float16
    assert convert(network, "bf16", [student.example(8)]).kept == ("last",)


@pytest.mark.parametrize(("share", "kept"), [(0.9, ("last",)), (1.1, ("small", "", "last"))])
def test_the_share_leaves_room_for_other_images(student: Network, share: float, kept: tuple[str, ...]) -> None:
    network = made(student, Overflows(1.0))
    module = network.module
    assert isinstance(module, Overflows)
    batch = student.example(8)
    with torch.no_grad():
        module.small.bias.zero_()
        largest = module.small(module.large(module.first(batch)) + module.first(batch)).abs().max()
        module.small.weight.mul_(share * SAFE_SHARE * torch.finfo(torch.float16).max / largest)
    assert convert(network, "fp16", [batch]).kept == kept


class ChangesItsMind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 10), nn.Linear(64, 10)
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        flat = images.flatten(1)
        logits: Tensor = self.first(flat) if self.calls < 3 else self.second(flat).relu()
        return logits


def test_a_forward_that_changes_is_refused(student: Network) -> None:
    network = Network(ChangesItsMind().eval(), student.spec, "mine.py")
    converted = convert(network, "fp16", [student.example(2)])
    with pytest.raises(NetworkError, match=r"mine.py: its forward does not make the same calls"):
        converted.module(student.example(2))


def test_what_onnx_lacks_in_bfloat16_stays_in_fp32() -> None:
    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(8, 8), nn.Linear(2, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.stem(images.flatten(1)).topk(2).values)

    spec = NetworkSpec(name="any", input=InputSpec(shape=(1, 2, 4), mean=(0.5,), std=(0.5,)))
    network = Network(Largest(), spec, "any")
    kept = {precision: convert(network, precision, [network.example(4)]).kept for precision in ("fp16", "bf16")}
    assert kept == {"fp16": ("head",), "bf16": ("", "head")}
