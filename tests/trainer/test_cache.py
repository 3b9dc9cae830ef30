from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from litdeploy.config.recipe import Augmentation
from litdeploy.data import Crops, draw_crops
from litdeploy.errors import TrainingError
from litdeploy.networks.families.resnet import resnet
from litdeploy.networks.sections import SectionCall
from litdeploy.trainer.cache import FeatureCache, Layout
from litdeploy.trainer.teacher import Features, Teacher

CPU = torch.device("cpu")
NAMES = ("layer1", "layer2", "layer3")
IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
AUGMENTATION = Augmentation(padding=2, flip=True)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(resnet(14, width=4).eval(), NAMES, IMAGES, CPU, "bf16")


def layout_of(teacher: Teacher, inputs: tuple[str, ...] = ("layer2", "layer3")) -> Layout:
    layout = Layout.of(teacher.template, inputs, NAMES)
    assert layout is not None
    return layout


def cache_of(
    teacher: Teacher, views: int = 2, folder: Path | None = None, key: dict[str, str] | None = None
) -> FeatureCache:
    return FeatureCache(teacher.template, layout_of(teacher), views, len(IMAGES), 2, CPU, folder, key)


def fresh(indices_N: Tensor, seed: int = 0) -> Crops:
    return draw_crops(len(indices_N), AUGMENTATION, torch.Generator().manual_seed(seed))


def fill(cache: FeatureCache, teacher: Teacher, indices_N: Tensor, seed: int = 0) -> Tensor:
    """What an epoch does with a batch that is not known."""
    views = cache.choose(indices_N, fresh(indices_N, seed))
    assert not views.known
    cache.write(views.slots_N, teacher(IMAGES[indices_N]))
    cache.mark(views)
    return views.slots_N


def test_an_input_that_is_anothers_output_is_kept_once(teacher: Teacher) -> None:
    layout = layout_of(teacher, NAMES)
    assert layout.shapes == {
        "layer1.input": (4, 8, 8),
        "layer1.output": (4, 8, 8),
        "layer2.output": (8, 4, 4),
        "layer3.output": (16, 2, 2),
    }
    assert layout.inputs == {"layer1": "layer1.input", "layer2": "layer1.output", "layer3": "layer2.output"}
    assert layout.bytes(3, 5) == 15 * (2 * (256 + 256 + 128 + 64) + 4 * 10 + 6)


def test_sections_that_take_further_tensors_are_not_kept(teacher: Teacher) -> None:
    calls = dict(teacher.template.calls)
    first = calls["layer1"]
    calls["layer1"] = SectionCall(first.input, ((), {"mask": torch.ones(1)}), first.output)
    features = Features(teacher.template.logits_NK, calls)
    assert Layout.of(features, NAMES[:1], NAMES) is None
    # Their outputs are what they are.
    kept = Layout.of(features, NAMES[1:], NAMES)
    assert kept is not None
    assert "layer1.output" in kept.shapes


def test_only_the_logits_are_kept_where_no_section_is_compared(teacher: Teacher) -> None:
    layout = Layout.of(teacher.template, (), ())
    assert layout is not None
    assert layout.shapes == {}
    cache = FeatureCache(teacher.template, layout, 1, len(IMAGES), 2, CPU)
    cache.begin_pass()
    indices_N = torch.arange(4)
    found = cache.read(fill(cache, teacher, indices_N))
    assert torch.equal(found.logits_NK, teacher(IMAGES[:4]).logits_NK)
    assert found.calls["layer1"].output.numel() == 0


@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_read_is_what_the_teacher_gave(teacher: Teacher, tmp_path: Path, mapped: bool) -> None:
    cache = cache_of(teacher, folder=tmp_path / "features" if mapped else None)
    assert cache.mapped is mapped
    cache.begin_pass()
    indices_N = torch.tensor([7, 2, 9, 4])
    found = cache.read(fill(cache, teacher, indices_N))
    expected = teacher(IMAGES[indices_N])
    assert torch.equal(found.logits_NK, expected.logits_NK)
    assert tuple(found.calls) == NAMES
    for name in NAMES:
        assert torch.equal(found.calls[name].output, expected.calls[name].output)
        assert found.calls[name].output.is_contiguous(memory_format=torch.channels_last)
        assert found.calls[name].arguments == expected.calls[name].arguments
    assert torch.equal(found.calls["layer2"].input, expected.calls["layer2"].input)
    assert found.calls["layer1"].input.numel() == 0  # nobody asked for it


def test_views_come_in_turn_and_again(teacher: Teacher) -> None:
    cache = cache_of(teacher, views=2)
    indices_N = torch.arange(len(IMAGES))
    seen = []
    for number in range(5):
        cache.begin_pass()
        views = cache.choose(indices_N, fresh(indices_N, seed=number))
        seen.append(views.crops.tops_N.tolist() + views.crops.flips_N.tolist())
        assert views.known is (number >= 2)
        if not views.known:
            fill(cache, teacher, indices_N, seed=number)
    assert seen[0] != seen[1]
    assert seen[2:] == [seen[0], seen[1], seen[0]]


def test_an_image_left_out_of_a_pass_is_seen_in_a_view_that_is_kept(teacher: Teacher) -> None:
    cache = cache_of(teacher, views=2)
    everything = torch.arange(len(IMAGES))
    cache.begin_pass()
    fill(cache, teacher, everything[:-1])
    cache.begin_pass()
    fill(cache, teacher, everything, seed=1)
    cache.begin_pass()  # the first view's turn
    views = cache.choose(everything, fresh(everything, seed=2))
    assert views.known
    assert views.slots_N.tolist() == [*range(len(IMAGES) - 1), 2 * len(IMAGES) - 1]


def test_a_batch_in_part_known_keeps_the_known_views(teacher: Teacher) -> None:
    cache = cache_of(teacher)
    cache.begin_pass()
    first = torch.tensor([0, 1, 2])
    fill(cache, teacher, first, seed=0)
    both = torch.tensor([1, 5])
    views = cache.choose(both, fresh(both, seed=5))
    assert not views.known
    assert views.crops.tops_N.tolist() == [fresh(first).tops_N[1].item(), fresh(both, 5).tops_N[1].item()]


def test_written_and_not_marked_is_not_there(teacher: Teacher) -> None:
    cache = cache_of(teacher)
    cache.begin_pass()
    indices_N = torch.tensor([3])
    views = cache.choose(indices_N, fresh(indices_N))
    cache.write(views.slots_N, teacher(IMAGES[indices_N]))
    assert not cache.choose(indices_N, fresh(indices_N)).known


def test_a_folder_serves_the_next_run(teacher: Teacher, tmp_path: Path) -> None:
    indices_N = torch.arange(len(IMAGES))
    first = cache_of(teacher, folder=tmp_path / "features", key={"teacher": "a"})
    first.begin_pass()
    slots_N = fill(first, teacher, indices_N)
    second = cache_of(teacher, folder=tmp_path / "features", key={"teacher": "a"})
    second.begin_pass()
    views = second.choose(indices_N, fresh(indices_N, seed=9))
    assert views.known
    assert torch.equal(views.crops.tops_N, fresh(indices_N).tops_N)
    assert torch.equal(second.read(views.slots_N).logits_NK, first.read(slots_N).logits_NK)


def test_a_folder_of_another_teacher_is_refused_and_left_alone(teacher: Teacher, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    cache_of(teacher, folder=folder, key={"teacher": "a", "data": "x"})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TrainingError, match=r"another run \(teacher, views differ\).*--feature-cache-dir"):
        cache_of(teacher, views=3, folder=folder, key={"teacher": "b", "data": "x"})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_key_can_be_read(teacher: Teacher, tmp_path: Path) -> None:
    cache_of(teacher, folder=tmp_path, key={"teacher": "a"})
    key = json.loads((tmp_path / "key.json").read_text())
    assert key["views"] == 2
    assert key["teacher"] == "a"
    assert key["shapes"]["layer3.output"] == [16, 2, 2]
