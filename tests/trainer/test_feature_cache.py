from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from litdeploy.batch import Batch, tensors_of
from litdeploy.config.recipe import Augmentation
from litdeploy.data import Crops, draw_crops
from litdeploy.errors import TrainingError
from litdeploy.networks.families.resnet import resnet
from litdeploy.networks.sections import SectionCall
from litdeploy.trainer import feature_cache
from litdeploy.trainer.feature_cache import LAST, CacheFiles, FeatureCache, Layout, plan_cache
from litdeploy.trainer.teacher import Features, Teacher
from tests import sections

CPU = torch.device("cpu")
NAMES = ("layer1", "layer2", "layer3")
IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
AUGMENTATION = Augmentation(padding=2, flip=True)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    module = resnet(14, width=4).eval()
    return Teacher(module, sections.of(module, NAMES), IMAGES, CPU, "bf16")


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
    calls["layer1"] = SectionCall(first.input, [((), {}), ((), {"mask": torch.ones(1)})], first.output)
    features = Features(teacher.template.output, calls)
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
    assert torch.equal(found.output, teacher(IMAGES[:4]).output)
    assert found.calls["layer1"].output.numel() == 0


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    "shapes", [{"logits": (5, 7)}, {"logits": (3, 4, 6)}, {"logits": ()}, {"boxes/a": (4,), "label": ()}]
)
def test_an_answer_of_any_shape_is_kept(shapes: dict[str, tuple[int, ...]], tmp_path: Path, mapped: bool) -> None:
    answer: Batch = {name: torch.randn(3, *shape) for name, shape in shapes.items()}
    if "label" in answer:
        answer["label"] = torch.tensor([4, 0, 2])
    features = Features(answer if len(answer) > 1 else answer["logits"], {})
    layout = Layout.of(features, (), ())
    assert layout is not None
    assert layout.output == shapes
    cache = FeatureCache(features, layout, 1, 3, 0, CPU, tmp_path / "features" if mapped else None)
    cache.write(torch.arange(3), features)
    found = cache.read(torch.tensor([2, 0])).output
    for given, read in zip(tensors_of(features.output), tensors_of(found), strict=True):
        assert read.dtype == given.dtype
        assert torch.equal(read, given[[2, 0]])


@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_read_is_what_the_teacher_gave(teacher: Teacher, tmp_path: Path, mapped: bool) -> None:
    cache = cache_of(teacher, folder=tmp_path / "features" if mapped else None)
    assert cache.mapped is mapped
    cache.begin_pass()
    indices_N = torch.tensor([7, 2, 9, 4])
    found = cache.read(fill(cache, teacher, indices_N))
    expected = teacher(IMAGES[indices_N])
    assert torch.equal(found.output, expected.output)
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
    assert torch.equal(second.read(views.slots_N).output, first.read(slots_N).output)


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


def opened(folder: Path) -> list[torch.Tensor]:
    """The two tensors of a folder."""
    files = CacheFiles(folder, {"teacher": "a"})
    found = [files.tensor("logits", (3, 2), torch.float32), files.tensor(LAST, (3,), torch.uint8)]
    files.flush()
    return found


def test_what_is_written_is_found_again(tmp_path: Path) -> None:
    logits, filled = opened(tmp_path / "features")
    assert not logits.any()
    logits[1], filled[1] = torch.tensor([1.5, -2.0]), 1
    again, still = opened(tmp_path / "features")
    assert torch.equal(again, logits)
    assert still.tolist() == [0, 1, 0]


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photograph.jpg").write_bytes(b"x")
    with pytest.raises(TrainingError, match="no feature cache, and not empty"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photograph.jpg"]


@pytest.mark.parametrize("text", ["", "[]", "null", "{"])
def test_a_damaged_key_is_told(tmp_path: Path, text: str) -> None:
    opened(tmp_path)
    (tmp_path / "key.json").write_text(text)
    with pytest.raises(TrainingError, match=r"key.json: .*--feature-cache-dir"):
        opened(tmp_path)


def test_a_file_of_another_size_is_told(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "logits.bin").write_bytes(b"x")
    with pytest.raises(TrainingError, match=r"logits.bin: .*--feature-cache-dir"):
        opened(tmp_path)


def test_a_file_that_is_gone_is_told_once_all_were_there(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "logits.bin").unlink()
    with pytest.raises(TrainingError, match=r"logits.bin: has 0 bytes instead of 24"):
        opened(tmp_path)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYOUT = Layout({"layer1.output": (16, 32, 32)}, {}, {"logits": (10,)})
ONE_VIEW = 1000 * (2 * 16 * 32 * 32 + 40 + 6)


class Usage(NamedTuple):
    free: int


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """How much there is of memory and disk, in views of the images; half of it may be used."""

    def give(memory: float, disk: float) -> None:
        monkeypatch.setattr(feature_cache, "free_memory", lambda device: int(2 * memory * ONE_VIEW))
        monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda folder: Usage(int(2 * disk * ONE_VIEW)))

    return give


@pytest.mark.parametrize(
    ("setting", "epochs", "device", "keep", "memory", "disk", "views", "mapped", "why"),
    [
        ("off", 100, CPU, False, 9, 9, 0, False, "off"),
        ("auto", 100, CPU, False, 4, 0, 4, False, r"4 views of 1,000 images, 0.13 GB in memory; .* 4 of 100 epochs"),
        ("auto", 7, CPU, False, 9, 9, 0, False, "less than twice in 7 epochs"),
        ("auto", 8, CPU, False, 9, 9, 4, False, "4 of 8 epochs"),
        ("auto", 7, CPU, True, 9, 9, 4, True, "features; the teacher runs in 4 of 7 epochs"),
        ("auto", 100, CPU, False, 3, 4, 4, True, "features"),
        ("auto", 100, CPU, False, 1.9, 9, 0, False, "do not fit"),
        ("auto", 100, CUDA, False, 3, 4, 0, False, "do not fit"),
        ("auto", 100, CPU, False, 3, 3, 0, False, "do not fit"),
        (6, 100, CUDA, False, 3, 6, 6, True, "6 views"),
        (1, 1, CPU, False, 1, 0, 1, False, "1 view of 1,000 images"),
    ],
)
def test_plan_cache(
    room: Any,
    tmp_path: Path,
    setting: Any,
    epochs: int,
    device: torch.device,
    keep: bool,
    memory: float,
    disk: float,
    views: int,
    mapped: bool,
    why: str,
) -> None:
    room(memory, disk)
    found = plan_cache(setting, LAYOUT, 1000, epochs, device, tmp_path / "features", keep)
    assert (found.views, found.mapped) == (views, mapped)
    assert re.search(why, found.why)


def test_several_ranks_keep_no_features(room: Any, tmp_path: Path) -> None:
    room(9, 9)
    found = plan_cache("auto", LAYOUT, 1000, 100, CPU, tmp_path, False, ranks=2)
    assert (found.views, found.why) == (0, "feature cache: none; it is not kept by several ranks, and there are 2")


def test_what_was_asked_for_and_does_not_fit_is_an_error(room: Any, tmp_path: Path) -> None:
    room(1, 1)
    with pytest.raises(TrainingError, match=r"--feature-cache 2: 2 views .* do not fit; .*--feature-cache off"):
        plan_cache(2, LAYOUT, 1000, 9, CPU, tmp_path, False)


def test_features_that_cannot_be_kept(tmp_path: Path) -> None:
    assert plan_cache("auto", None, 1000, 9, CPU, tmp_path, False).views == 0
    with pytest.raises(TrainingError, match="an attention mask"):
        plan_cache(2, None, 1000, 9, CPU, tmp_path, False)
