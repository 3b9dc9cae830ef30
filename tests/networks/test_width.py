from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from litdeploy.config.spec import InputSpec, NetworkSpec
from litdeploy.errors import CheckpointError, NetworkError, StudentError
from litdeploy.networks import Network, load, new, new_like
from litdeploy.networks.sections import recording
from litdeploy.networks.width import match_sections, narrow, scales_of, slim, widths_of
from litdeploy.storage.checkpoint import write_checkpoint
from tests import sections

NAMES = ("layer1", "layer2", "layer3")


def teacher(network: str = "resnet14,width=8") -> Network:
    made = new(network, normalise="half", input_shape=(1, 8, 8), classes=10, seed=0)
    made.module.train()(torch.randn(64, 1, 8, 8))  # statistics that are not those of the start
    made.module.eval()
    return made


@pytest.mark.parametrize("student", ["resnet14,width=4", "resnet8,width=3"])
def test_the_channels_kept_are_those_of_the_largest_filters(student: str) -> None:
    wide = teacher()
    narrow = new_like(student, wide, 1)
    for match in match_sections(wide, narrow):
        assert (match.student, match.teacher, match.dim) == (match.teacher, match.teacher, 1)
        filters = wide.module.get_submodule(match.teacher)[-1].conv2.weight.detach()
        norms = [float(filters[index].abs().sum()) for index in range(len(filters))]
        assert match.channels is not None
        assert match.channels.tolist() == sorted(match.channels.tolist())
        kept = {norms[index] for index in match.channels.tolist()}
        assert min(kept) > max(set(norms) - kept)


def test_selecting_channels_is_what_pruning_the_last_layer_with_its_statistics_gives() -> None:
    """And neither the teacher's mode nor its weights change."""
    wide = teacher()
    before = {name: value.clone() for name, value in wide.module.state_dict().items()}
    matches = match_sections(wide, new_like("resnet14,width=4", wide, 1))
    assert all(torch.equal(value, before[name]) for name, value in wide.module.state_dict().items())
    assert not any(part.training for part in wide.module.modules())
    images = wide.example(4)
    with torch.no_grad(), recording(wide.module, sections.of(wide.module, NAMES)) as calls:
        wide.module(images)
    for match in matches:
        channels = match.channels
        assert channels is not None
        block = wide.module.get_submodule(match.teacher)[-1]
        conv = nn.Conv2d(block.conv2.in_channels, len(channels), 3, 1, 1, bias=False)
        norm = nn.BatchNorm2d(len(channels)).eval()
        conv.load_state_dict({"weight": block.conv2.weight[channels]})
        norm.load_state_dict(
            {name: value[channels] if value.dim() else value for name, value in block.bn2.state_dict().items()}
        )
        given = calls[match.teacher].input
        for earlier in wide.module.get_submodule(match.teacher)[:-1]:
            given = earlier(given)
        pruned = torch.relu(norm(conv(torch.relu(block.bn1(block.conv1(given))))) + block.shortcut(given)[:, channels])
        selected = calls[match.teacher].output.index_select(match.dim, channels)
        torch.testing.assert_close(selected, pruned, rtol=1e-5, atol=1e-5)


def test_a_student_as_wide_keeps_all() -> None:
    wide = teacher()
    assert [match.channels for match in match_sections(wide, new_like("resnet20,width=8", wide, 1))] == [None] * 3


class Tokens(nn.Module):
    """Two sections of blocks on (N, 16 tokens, width), under names that the caller chooses."""

    def __init__(self, width: int, first: str, second: str) -> None:
        super().__init__()
        self.names = (first, second)
        self.stem, self.middle = nn.Linear(4, width), nn.Linear(width, 2 * width)
        self.add_module(first, nn.Sequential(*(nn.Linear(width, width) for _ in range(2))))
        self.add_module(second, nn.Sequential(*(nn.Linear(2 * width, 2 * width) for _ in range(3))))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first, second = (self.get_submodule(name) for name in self.names)
        tokens = first(self.stem(images.reshape(len(images), 16, 4)))
        logits: torch.Tensor = self.head(second(self.middle(tokens)).mean(1))
        return logits


def tokens(width: int, first: str, second: str) -> Network:
    spec = NetworkSpec(name="mine:Tokens", input=InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.5,)))
    return Network(Tokens(width, first, second), spec, "Tokens")


def test_sections_of_other_names_are_matched_in_order_and_by_whichever_dimension_differs() -> None:
    matches = match_sections(tokens(6, "a", "b"), tokens(5, "one", "two"))
    assert [(match.student, match.teacher, match.dim) for match in matches] == [("one", "a", 2), ("two", "b", 2)]
    assert [len(match.channels) for match in matches if match.channels is not None] == [5, 10]


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (lambda wide: new_like("resnet14,width=16", wide, 0), "may have fewer"),
        (lambda wide: tokens(4, "one", "two"), r"has 2 sections \(one, two\), and the teacher 3"),
    ],
)
def test_students_that_do_not_match(student: object, message: str) -> None:
    wide = teacher()
    with pytest.raises(StudentError, match=message):
        match_sections(wide, student(wide))  # type: ignore[operator]


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
