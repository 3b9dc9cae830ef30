from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from litdeploy.config.recipe import Augmentation
from litdeploy.config.spec import InputSpec
from litdeploy.data import Crops, draw_crops
from litdeploy.trainer import kernels
from litdeploy.trainer.kernels import reference
from litdeploy.trainer.step import Captured

from .conftest import INTERPRETED

SPEC = InputSpec(shape=(3, 8, 8), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
CUDA = torch.device("cuda")


def batch(device: torch.device, seed: int) -> list[Tensor]:
    """Pixels, weights of two sections and of a classifier, labels, and the draws of the augmentation."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(256, (20, 3, 8, 8), generator=generator).to(torch.uint8)
    weights = [torch.randn(shape, generator=generator) for shape in ((3, 8, 8), (3, 4, 8), (3,))]
    crops = draw_crops(6, Augmentation(padding=4, flip=True), generator)
    rows, labels = (torch.randint(high, (6,), generator=generator) for high in (20, 3))
    return [each.to(device) for each in (source, *weights, labels, rows, crops.tops_N, crops.lefts_N, crops.flips_N)]


def losses(*tensors: Tensor, functions: ModuleType = kernels) -> dict[str, Tensor]:
    """What uses all kernels, with its gradients."""
    source, *weights, labels, rows, tops, lefts, flips = tensors
    first, second, last = weights = [weight.detach().requires_grad_() for weight in weights]
    images = functions.augmented(source, rows, Crops(tops, lefts, flips, 4), SPEC)
    sections = functions.section_losses([images * first, images[:, :, ::2] * second], [images, images[:, :, ::2]])
    logits = images.mean((2, 3)) * last
    kd = functions.distillation_loss(logits, logits.flip(0), labels, 0.3, 4.0)
    gradients = torch.autograd.grad(sections.sum() + 2 * kd, weights)
    return {"kd": kd.detach(), "sections": sections.detach(), **dict(zip("abc", gradients, strict=True))}


def test_the_references_run_on_the_cpu() -> None:
    inputs = batch(torch.device("cpu"), 0)
    torch.testing.assert_close(losses(*inputs), losses(*inputs, functions=reference), rtol=0, atol=0)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors on the CPU")
def test_where_triton_does_not_work_it_is_said_and_the_reference_serves() -> None:
    with pytest.warns(UserWarning, match="fused kernels cannot run on cpu, and their slower references do"):
        assert not kernels._works_on(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_run_on_a_gpu() -> None:
    logits = torch.randn(4, 5, device=CUDA, requires_grad=True)
    labels = torch.zeros(4, dtype=torch.int64, device=CUDA)
    assert "litdeploy" in str(kernels.distillation_loss(logits, logits, labels, 0.3, 4.0).grad_fn)
    assert "litdeploy" in str(kernels.section_losses([logits], [logits]).grad_fn)
    inputs = batch(CUDA, 0)
    torch.testing.assert_close(losses(*inputs), losses(*inputs, functions=reference), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_captures_them() -> None:
    captured = Captured(losses)
    for seed in range(6):
        inputs = batch(CUDA, seed)
        found = {name: value.clone() for name, value in captured(*inputs).items()}
        torch.testing.assert_close(found, losses(*inputs), rtol=1e-5, atol=1e-6)
