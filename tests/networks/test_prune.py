from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from litdeploy.errors import CheckpointError, NetworkError, StudentError
from litdeploy.networks import load, new
from litdeploy.networks.prune import scales_of, slim
from litdeploy.networks.width import narrow, widths_of
from litdeploy.storage.checkpoint import write_checkpoint

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Dense(nn.Module):
    """Concatenation, a depthwise convolution, and a flattened map before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(6, 4, 3, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(10, 8, 3, 2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        first = self.deep(self.first(images))
        both = torch.cat([nn.functional.avg_pool2d(first, 2), self.wide(first)], 1)
        logits: Tensor = self.head(self.last(both).flatten(1))
        return logits


def prepared(name: str, padded: bool) -> nn.Module:
    """With statistics, and every other channel's scale and shift 0; with padded shortcuts, those inside the blocks."""
    torch.manual_seed(0)
    made = new(name, normalise="half", input_shape=(1, 8, 8), classes=10, seed=0).module if name else Dense()
    made.train()(torch.randn(64, 1, 8, 8))
    for part, norm in made.named_modules():
        if isinstance(norm, _BatchNorm):
            with torch.no_grad():
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_()
                if not padded or (part.endswith("bn1") and part != "bn1"):
                    norm.weight[::2] = norm.bias[::2] = 0
    return made.eval()


@pytest.mark.parametrize(
    ("name", "fixed"),
    [("resnet14,width=4", ("conv1",)), ("resnet14,width=4,shortcut=B", ()), ("", ())],
)
def test_channels_that_give_nothing_go_and_nothing_changes(tmp_path: Path, name: str, fixed: tuple[str, ...]) -> None:
    module = prepared(name, padded=bool(fixed))
    wide = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    with torch.no_grad():
        before = module(IMAGES)
    parameters = sum(value.numel() for value in module.parameters())
    found = slim(module, IMAGES, 0.5)
    assert (2 * found.removed, found.fixed) == (found.channels, fixed)
    assert sum(value.numel() for value in module.parameters()) < 0.75 * parameters
    with torch.no_grad():
        torch.testing.assert_close(module(IMAGES), before, rtol=1e-4, atol=1e-4)
    if not name:
        assert module.deep[0].groups == module.deep[0].out_channels == 3
    # And it is rebuilt from what its file says of it.
    widths = widths_of(module, wide)
    assert any(name.endswith(("bn1", "1")) for name in widths)
    if name:
        spec = new(name, normalise="half", input_shape=(1, 8, 8), classes=10, seed=5).spec.with_(widths=widths)
        write_checkpoint(tmp_path / "slim.safetensors", module.state_dict(), spec)
        again = load(tmp_path / "slim.safetensors")
        assert again.spec == spec
        rebuilt = again.module
    else:
        rebuilt = Dense()
        narrow(rebuilt, widths)
        rebuilt.load_state_dict(module.state_dict())
        rebuilt.eval()
    assert str(rebuilt) == str(module)
    with torch.no_grad():
        assert torch.equal(rebuilt(IMAGES), module(IMAGES))


@pytest.mark.parametrize("name", ["resnet14,width=4,shortcut=B", "resnext20,cardinality=2,width=2,out_width=2", ""])
def test_no_layer_is_left_without_channels(name: str) -> None:
    module = prepared(name, padded=False)
    found = slim(module, IMAGES, 0.99)
    assert 0.7 * found.channels < found.removed < found.channels
    assert all(min(value.shape, default=1) > 0 for value in module.state_dict().values())
    assert module(IMAGES).shape == (4, 10)
    module.train()(IMAGES).sum().backward()
    assert all(scale.grad is not None for scale in scales_of(module))


def test_the_smallest_scales_of_the_whole_network_go() -> None:
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 10)
    )
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor([0.1, -0.2, 0.3, 5.0]))
        module[3].weight.copy_(torch.tensor([1.0, -0.15, 2.0, -3.0]))
    assert slim(module, IMAGES, 0.5).removed == 4
    assert module[1].weight.tolist() == [5.0]
    assert module[3].weight.tolist() == [1.0, 2.0, -3.0]
    assert module[5].in_features == 48


def test_what_a_network_gives_is_left() -> None:
    own = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 10, 3), nn.BatchNorm2d(10))
    found = slim(nn.Sequential(own, nn.AdaptiveAvgPool2d(1), nn.Flatten()), IMAGES, 0.5)
    assert (found.channels, found.removed, found.fixed) == (4, 2, ("0.2",))
    assert own[3].num_features == 10


def test_networks_without_channels_that_can_go() -> None:
    with pytest.raises(StudentError, match=r"has none.*--method lit"):
        scales_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    grouped = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten())
    with pytest.raises(StudentError, match=r"no layer .*\(0: their channels"):
        slim(nn.Sequential(*grouped, nn.Linear(64, 10)), IMAGES, 0.5)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"layer9.0.conv1": (2, 2, 3, 3)}, "no such layer"),
        ({"layer1": (2,)}, "no such layer"),
        ({"bn1": (0,)}, r"shape \(0,\): the network has one of \(4,\)"),
        ({"bn1": (5,)}, r"has one of \(4,\)"),
        ({"conv1": (2,)}, r"has one of \(4, 1, 3, 3\)"),
        ({"conv1": (4, 1, 1, 3)}, r"has one of \(4, 1, 3, 3\)"),
        ({"conv1": (10**9, 1, 3, 3)}, r"has one of \(4, 1, 3, 3\)"),
    ],
)
def test_widths_that_the_network_cannot_have(tmp_path: Path, widths: dict[str, tuple[int, ...]], message: str) -> None:
    made = new("resnet8,width=4", normalise="half", input_shape=(1, 8, 8), classes=10, seed=0)
    path = tmp_path / "odd.safetensors"
    write_checkpoint(path, made.module.state_dict(), made.spec.with_(widths=widths))
    with pytest.raises(NetworkError, match=message):
        load(path)


@pytest.mark.parametrize("layer", ["bn1", "conv1", "linear"])
def test_widths_that_do_not_fit_together(tmp_path: Path, layer: str) -> None:
    """The header and the weights of a file may be of one mind, and no network come of it."""
    made = new("resnet8,width=4", normalise="half", input_shape=(1, 8, 8), classes=10, seed=0)
    first, *others = made.module.get_submodule(layer).weight.shape
    widths = {layer: (first // 2, *others)} if layer != "linear" else {layer: (first, others[0] // 2)}
    narrow(made.module, widths)
    path = tmp_path / "odd.safetensors"
    write_checkpoint(path, made.module.state_dict(), made.spec.with_(widths=widths))
    with pytest.raises(NetworkError, match="do not fit together"):
        load(path)


def test_widths_that_the_weights_do_not_have(tmp_path: Path) -> None:
    made = new("resnet8,width=4", normalise="half", input_shape=(1, 8, 8), classes=10, seed=0)
    path = tmp_path / "odd.safetensors"
    write_checkpoint(path, made.module.state_dict(), made.spec.with_(widths={"bn1": (2,)}))
    with pytest.raises(CheckpointError, match=r"bn1"):
        load(path)


def test_a_network_of_texts_is_slimmed(tmp_path: Path) -> None:
    made = new("vdcnn9", normalise=None, classes=3, seed=0)
    wide = {key: tuple(value.shape) for key, value in made.module.state_dict().items()}
    slim(made.module, made.example(), 0.5)
    path = tmp_path / "narrow.safetensors"
    write_checkpoint(path, made.module.state_dict(), made.spec.with_(widths=widths_of(made.module, wide)))
    with torch.no_grad():
        assert torch.equal(load(path).module(made.example()), made.module.eval()(made.example()))
