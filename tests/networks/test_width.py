from __future__ import annotations

import pytest
import torch
from torch import nn

from litdeploy.config.spec import InputSpec, NetworkSpec
from litdeploy.errors import StudentError
from litdeploy.networks import Network, new, new_like
from litdeploy.networks.sections import recording
from litdeploy.networks.width import match_sections

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
    with torch.no_grad(), recording(wide.module, NAMES) as calls:
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
