"""Adversarial fine-tuning of a generator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdeploy.config.recipe import Recipe
from litdeploy.errors import NetworkError
from litdeploy.networks import load
from litdeploy.tasks import task_of
from litdeploy.tasks.translation import as_vectors
from litdeploy.trainer.objectives.objective import Objective, Outputs

if TYPE_CHECKING:
    from litdeploy.networks import Network


class Adversarial(Objective):
    """A generator against a frozen discriminator (Choi et al., "StarGAN", CVPR 2018, equation 6).

    L = −mean D_src(G(x, c)) + λ_cls · L_cls(D_cls(G(x, c)), c) + λ_rec · mean |x − G(G(x, c), c')|, where x is an image
    of the domains c' and c are others. L_cls is the cross-entropy; of attributes the binary one, summed over them.

    λ_teacher · mean |G(x, c) − T(x, c)| is added, which the paper does not have: there the discriminator learns too. A
    frozen one takes some images for real that no person would, and an unconstrained generator finds them
    (benchmarks/results/amd-epyc-2-cores/stargan.json).

    Args:
        discriminator: images (N, C, H, W) → how real each patch is, and logits (N, K) of the domains. Frozen.
    """

    scored = False  # images that look real are further from the teacher's
    learns_by = "images"
    needs_labels = True

    def __init__(self, recipe: Recipe, discriminator: nn.Module) -> None:
        self.recipe = recipe
        self.needs_teacher = recipe.teacher_weight > 0
        self.discriminator = discriminator.eval().requires_grad_(False)

    def losses(self, outputs: Outputs) -> dict[str, Tensor]:
        assert isinstance(outputs.inputs, dict)
        assert outputs.again is not None
        images_NCHW, wanted_NK = outputs.inputs["images"], outputs.inputs["domains"]
        translated_NCHW = outputs.logits
        realness, logits_NK = self.discriminator.to(translated_NCHW.device)(translated_NCHW)
        own_NK = as_vectors(outputs.labels, wanted_NK.shape[1])
        back_NCHW = outputs.again({"images": translated_NCHW, "domains": own_NK})
        assert isinstance(back_NCHW, Tensor)
        adversarial = -realness.float().mean()
        domain = domain_loss(logits_NK.float(), wanted_NK.float(), exclusive=outputs.labels.dim() == 1)
        cycle = (images_NCHW.float() - back_NCHW.float()).abs().mean()
        loss = adversarial + self.recipe.domain_weight * domain + self.recipe.cycle_weight * cycle
        parts = {"adversarial": adversarial, "domain": domain, "cycle": cycle}
        if outputs.teacher_output is not None:
            assert isinstance(outputs.teacher_output, Tensor)
            parts["teacher"] = F.l1_loss(translated_NCHW, outputs.teacher_output)
            loss = loss + self.recipe.teacher_weight * parts["teacher"]
        return {"loss": loss, **parts}


def domain_loss(logits_NK: Tensor, wanted_NK: Tensor, exclusive: bool) -> Tensor:
    """Cross-entropy of the domains that were wanted; of attributes the binary one, summed over them, mean over images.

    Args:
        wanted_NK: 0 or 1.
        exclusive: whether each image has one domain; else each column is an attribute.
    """
    if exclusive:
        return F.cross_entropy(logits_NK, wanted_NK.argmax(1))
    return F.binary_cross_entropy_with_logits(logits_NK, wanted_NK, reduction="sum") / len(logits_NK)


def load_discriminator(path: str, generator: Network) -> nn.Module:
    """Load a discriminator and check it against the generator's images and domains.

    Raises:
        CheckpointError, NetworkError: the file is missing, or its network does not judge these images.
    """
    spec, task = generator.spec.input, task_of(generator.spec)
    if task.output != "images":
        raise NetworkError(
            f"--discriminator {path}: is for networks that make images, and {generator.spec.name} {task.makes}. "
            "Leave it out."
        )
    assert spec.images is not None
    module = load(path).module
    try:
        with torch.no_grad():
            realness, logits_NK = module(torch.zeros(1, *spec.images.shape))
        found = logits_NK.shape[-1] if realness.dim() == 4 else 0
    except (RuntimeError, TypeError, ValueError, AttributeError):
        found = 0  # another number of channels, smaller images than it takes, or no discriminator at all
    if found != spec.domains:
        raise NetworkError(
            f"--discriminator {path}: is no discriminator of images of {' × '.join(map(str, spec.images.shape))} in "
            f"{spec.domains} domains, as {generator.source} makes them. Give the one that was trained with this "
            "generator (of the published code: …-D.ckpt next to …-G.ckpt)."
        )
    return module
