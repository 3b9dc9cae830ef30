from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from litdeploy.data import Data, Split, free_memory, shuffled
from litdeploy.data.images import Images, ImageTable
from litdeploy.data.split import OnDemand, Resident, Streamed
from litdeploy.errors import DataError

CPU = torch.device("cpu")
ROWS = np.array([9, 2, 3, 5, 7, 0, 1])


@pytest.fixture
def images(encoded: Callable[..., bytes]) -> Images:
    import datasets

    cells = [{"bytes": encoded(number), "path": None} for number in range(10)]
    dataset = datasets.Dataset.from_dict({"img": cells}).cast_column("img", datasets.Image(decode=False))
    return Images(ImageTable("made", "train", dataset, None, np.arange(10) % 3), (3, 8, 6), resize=False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def resident(images: Images, device: torch.device = CPU) -> Resident:
    labels = torch.from_numpy(images.table.labels[ROWS]).to(device)
    return Resident(images.decode_all(ROWS, device), labels)


def mapped(images: Images, device: torch.device = CPU) -> OnDemand:
    every = images.decode(range(len(images.table)))
    labels = torch.from_numpy(images.table.labels[ROWS]).to(device)
    return OnDemand(lambda rows: every[torch.from_numpy(rows)], ROWS, labels)


def streamed(images: Images, rows: np.ndarray, device: torch.device, workers: int) -> Streamed:
    return Streamed(images.decode, rows, torch.from_numpy(images.table.labels[rows]).to(device), workers)


def made(kind: str, images: Images) -> Split:
    kinds: dict[str, Callable[[], Split]] = {
        "resident": lambda: resident(images),
        "mapped": lambda: mapped(images),
        "streamed": lambda: streamed(images, ROWS, CPU, workers=0),
        "workers": lambda: streamed(images, ROWS, CPU, workers=1),
    }
    return kinds[kind]()


@pytest.fixture(params=["resident", "mapped", "streamed"])
def split(request: pytest.FixtureRequest, images: Images) -> Split:
    return made(request.param, images)


def drawn(split: Split, batch_size: int, source: torch.Generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One pass in an order drawn by the generator."""
    return [(some.images(), some.labels_N) for some in split.pick(shuffled(len(split), batch_size, source))]


def test_in_order(split: Split, images: Images) -> None:
    pixels, labels = zip(*split.batches(3), strict=True)
    assert [len(some) for some in labels] == [3, 3, 1]
    assert torch.equal(torch.cat(pixels), images.decode(ROWS.tolist()))
    assert torch.cat(labels).tolist() == split.labels.tolist() == (ROWS % 3).tolist()
    assert pixels[0].dtype == torch.uint8
    assert labels[0].dtype == torch.int64
    assert len(split) == len(ROWS)


def test_shuffled_by_the_generator_every_image_once_with_its_label(split: Split, images: Images) -> None:
    source = generator()
    passes = [drawn(split, 7, source) for _ in range(2)]
    for [(pixels, labels)] in passes:
        seen = []
        for image, label in zip(pixels, labels, strict=True):
            [row] = [row for row in ROWS.tolist() if torch.equal(images.decode([row])[0], image)]
            assert row % 3 == label
            seen.append(row)
        assert sorted(seen) == sorted(ROWS.tolist())
    assert not torch.equal(passes[0][0][0], passes[1][0][0])


def test_a_shuffled_pass_has_whole_batches_only() -> None:
    assert [len(some) for some in shuffled(7, 3, generator())] == [3, 3]
    assert shuffled(7, 8, generator()) == ()
    first, second = shuffled(7, 3, generator(1)), shuffled(7, 3, generator(2))
    assert not torch.equal(first[0], second[0])


def test_what_is_picked_lies_where_the_images_are(split: Split, images: Images) -> None:
    [picked] = split.pick([torch.tensor([4, 0, 4])])
    assert torch.equal(picked.source_MCHW[picked.rows_N], images.decode(ROWS[[4, 0, 4]].tolist()))
    assert list(split.pick([])) == []


@pytest.mark.parametrize("kind", ["resident", "mapped", "streamed", "workers"])
def test_passes_beside_each_other_do_not_mix(images: Images, kind: str) -> None:
    split = made(kind, images)
    expected = [images.decode(some.tolist()).tolist() for some in np.split(ROWS, [2, 4, 6])]
    both = zip(split.batches(2), split.batches(2), strict=True)
    assert [(one[0].tolist(), other[0].tolist()) for one, other in both] == [(some, some) for some in expected]


def test_the_caller_may_write_to_a_batch(split: Split, images: Images) -> None:
    for pixels, labels in split.batches(3):
        pixels.zero_()
        labels.zero_()
    assert torch.equal(next(split.batches(7))[0], images.decode(ROWS.tolist()))
    assert split.labels.tolist() == (ROWS % 3).tolist()


def test_the_global_generator_is_left_alone(split: Split) -> None:
    before = torch.get_rng_state()
    drawn(split, 3, generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_give_what_memory_gives_pass_after_pass_also_after_one_that_was_left(images: Images) -> None:
    memory, anew = resident(images), streamed(images, ROWS, CPU, workers=2)
    others = {child.pid for child in multiprocessing.active_children()}
    workers = []
    for seed in range(3):
        ours, theirs = (drawn(split, 2, generator(seed)) for split in (anew, memory))
        for count, ((pixels, labels), (other_pixels, other_labels)) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(pixels, other_pixels)
            assert torch.equal(labels, other_labels)
            if seed == 1 and count == 1:
                break
        workers.append({child.pid for child in multiprocessing.active_children()} - others)
    assert len(workers[0]) == 2
    assert workers == [workers[0]] * 3  # starting them takes seconds


@pytest.mark.parametrize(("resident", "workers"), [(True, 0), (False, 0), (False, 1)])
def test_an_image_at_fault_is_named(
    tmp_path: Path, opened: Callable[..., Data], encoded: Callable[..., bytes], resident: bool, workers: int
) -> None:
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(encoded(number)[: 60 if number == 4 else None])
    rows = "".join(f"{number}.png,{number % 2}\n" for number in range(6))
    (tmp_path / "test.csv").write_text("file,label\n" + rows)
    data = opened(tmp_path, resident=resident, workers=workers)
    with pytest.raises(DataError, match=r"row 4 \(counted from 0\) of split 'test', 4\.png: cannot be decoded"):
        list(data.test.batches(2))


def test_a_worker_that_died_is_told(images: Images) -> None:
    others = {child.pid for child in multiprocessing.active_children()}
    batches = streamed(images, np.arange(10).repeat(10), CPU, workers=1).batches(2)
    next(batches)
    [worker] = [child for child in multiprocessing.active_children() if child.pid not in others]
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"worker process .* died .*--workers 0"):
        list(batches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_on_a_gpu(images: Images, workers: int) -> None:
    device = torch.device("cuda")
    for split in (resident(images, device), mapped(images, device), streamed(images, ROWS, device, workers)):
        expected = drawn(resident(images), 3, generator())
        for (pixels, labels), (right, right_labels) in zip(drawn(split, 3, generator()), expected, strict=True):
            assert pixels.device.type == labels.device.type == "cuda"
            assert torch.equal(pixels.cpu(), right)
            assert torch.equal(labels.cpu(), right_labels)


def test_free_memory_is_of_this_machine() -> None:
    assert 2**24 < free_memory(torch.device("cpu")) < 2**50
