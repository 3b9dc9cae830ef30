from __future__ import annotations

import pytest
import torch

from litdeploy.config.recipe import Augmentation
from litdeploy.config.spec import InputSpec
from litdeploy.data import augment, draw_crops, normalise, pixel_scale


def images(count: int = 64, channels: int = 3, height: int = 6, width: int = 5) -> torch.Tensor:
    # From 1, so that 0 can only be padding.
    return torch.randint(1, 256, (count, channels, height, width), generator=generator(9)).to(torch.uint8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cropped(before: torch.Tensor, augmentation: Augmentation, draws: torch.Generator) -> torch.Tensor:
    return augment(before, draw_crops(len(before), augmentation, draws))


def every_cut(image_CHW: torch.Tensor, padding: int, flip: bool) -> list[torch.Tensor]:
    """All that may come of one image, made one at a time."""
    _, height, width = image_CHW.shape
    padded = torch.nn.functional.pad(image_CHW, (padding,) * 4)
    cuts = [
        padded[:, top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]
    return cuts + [cut.flip(2) for cut in cuts] if flip else cuts


@pytest.mark.parametrize(("padding", "flip"), [(2, True), (2, False), (0, True), (4, True)])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_is_one_of_its_own_cuts(padding: int, flip: bool, channels: int) -> None:
    before = images(channels=channels)
    after = cropped(before, Augmentation(padding=padding, flip=flip), generator())
    assert after.shape == before.shape
    assert after.dtype == torch.uint8
    for one, cut in zip(before, after, strict=True):
        assert any(torch.equal(cut, allowed) for allowed in every_cut(one, padding, flip))


def test_images_are_cut_and_flipped_independently_of_each_other_and_over_the_whole_range() -> None:
    same = images(1).expand(2000, -1, -1, -1)
    after = cropped(same, Augmentation(padding=1, flip=True), generator())
    allowed = every_cut(same[0], 1, flip=True)
    counts = torch.tensor([sum(torch.equal(cut, one) for cut in after) for one in allowed])
    assert counts.sum() == 2000
    # 18 kinds, 111 of each expected; 4 standard deviations are 41.
    assert counts.min() > 70
    assert counts.max() < 152


def test_padding_is_black() -> None:
    after = cropped(images(), Augmentation(padding=4, flip=False), generator())
    assert (after == 0).any()


def test_the_same_generator_gives_the_same_and_the_input_is_kept() -> None:
    before = images()
    kept = before.clone()
    first, second = (cropped(before, Augmentation(padding=4, flip=True), generator(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, cropped(before, Augmentation(padding=4, flip=True), generator(4)))
    assert torch.equal(before, kept)


def test_nothing_to_do_draws_nothing() -> None:
    before, unused = images(), generator()
    assert torch.equal(cropped(before, Augmentation(padding=0, flip=False), unused), before)
    assert torch.equal(unused.get_state(), generator().get_state())


def test_normalise_is_the_formula_in_channels_last() -> None:
    spec = InputSpec(shape=(3, 6, 5), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    before = images()
    after = normalise(before, spec)
    expected = (before.double() / 255 - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(3, 1, 1)
    torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-6)
    assert after.dtype == torch.float32
    assert after.is_contiguous(memory_format=torch.channels_last)


def test_normalise_rounds_to_a_narrow_type_only_at_the_end() -> None:
    spec = InputSpec(shape=(3, 6, 5), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    before = images()
    narrow = normalise(before, spec, torch.bfloat16)
    assert torch.equal(narrow, normalise(before, spec).bfloat16())
    assert narrow.is_contiguous(memory_format=torch.channels_last)


def test_the_scale_of_an_input_is_made_once() -> None:
    scales = [pixel_scale(InputSpec(shape=(1, 6, 5), mean=(0.2,), std=(0.4,)), torch.device("cpu")) for _ in range(2)]
    assert all(first is second for first, second in zip(*scales, strict=True))
    assert torch.equal(torch.stack(scales[0]).flatten(), torch.tensor([51.0, 102.0]))


def test_statistics_first_used_in_inference_mode_serve_training_too() -> None:
    spec = InputSpec(shape=(1, 6, 5), mean=(0.123,), std=(0.321,))
    with torch.inference_mode():
        normalise(images(channels=1), spec)
    weight = torch.ones(1, 1, 6, 5, requires_grad=True)
    (normalise(images(channels=1), spec) * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same() -> None:
    before = images()
    spec = InputSpec(shape=(3, 6, 5), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    both = Augmentation(padding=4, flip=True)
    on_cpu = cropped(before, both, generator())
    on_gpu = augment(before.cuda(), draw_crops(len(before), both, generator()).to(torch.device("cuda")))
    assert torch.equal(on_gpu.cpu(), on_cpu)
    torch.testing.assert_close(normalise(on_gpu, spec).cpu(), normalise(on_cpu, spec))
