from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from litdeploy.config.recipe import Recipe
from litdeploy.config.spec import NetworkSpec, TranslationInput
from litdeploy.errors import NetworkError
from litdeploy.networks import Network
from litdeploy.networks.families.stargan import FAMILY, discriminator, stargan
from litdeploy.tasks.translation import as_vectors
from litdeploy.trainer.objectives import Adversarial
from litdeploy.trainer.objectives.adversarial import load_discriminator
from litdeploy.trainer.step import Step
from litdeploy.trainer.teacher import Features

RECIPE = Recipe(domain_weight=0.7, cycle_weight=3.0, teacher_weight=0)


@pytest.fixture
def generator() -> Network:
    torch.manual_seed(0)
    spec = NetworkSpec(name="stargan", input=FAMILY.input({"domains": 3}))
    assert isinstance(spec.input, TranslationInput)
    images = spec.input.images.model_copy(update={"shape": (3, 16, 16)})
    spec = spec.with_(input=spec.input.model_copy(update={"images": images}))
    return Network(stargan(blocks=2, domains=3, width=2), spec, "G.ckpt")


def _critic(domains: int = 3, channels: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return discriminator(layers=3, domains=domains, width=2, image_size=16, in_channels=channels)


@pytest.mark.parametrize("labels", [torch.tensor([0, 2]), torch.tensor([[0, 1, 1], [1, 0, 0]])])
def test_the_loss_is_equation_6(generator: Network, labels: torch.Tensor) -> None:
    critic = _critic()
    x = torch.randn(2, 3, 16, 16)
    own, wanted = as_vectors(labels, 3), as_vectors(labels.roll(1, 0), 3)
    with Step(generator.module, Adversarial(RECIPE, critic), ()) as step:
        found = step.losses({"images": x, "domains": wanted}, labels, None)

    fake = generator.module(x, wanted)
    patches, logits = critic(fake)
    expected = -patches.mean() + 3.0 * (x - generator.module(fake, own)).abs().mean()
    for image in range(2):
        if labels.dim() == 1:
            expected += 0.7 / 2 * -torch.log(logits[image].softmax(0)[wanted[image].argmax()])
        else:
            for k in range(3):
                share = torch.sigmoid(logits[image, k])
                expected += 0.7 / 2 * -torch.log(share if wanted[image, k] else 1 - share)
    torch.testing.assert_close(found["loss"], expected)
    assert found.keys() == {"loss", "adversarial", "domain", "cycle"}

    anchored = Adversarial(RECIPE.with_(teacher_weight=5), critic)
    assert anchored.needs_teacher
    made = torch.rand_like(x)
    with Step(generator.module, anchored, ()) as step:
        held = step.losses({"images": x, "domains": wanted}, labels, Features(made, {}))
    torch.testing.assert_close(held["loss"], expected + 5 * (fake - made).abs().mean())


def test_the_generator_learns_and_the_discriminator_stays_as_it_is(generator: Network) -> None:
    critic = _critic()
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    labels = torch.tensor([0, 1, 2, 0])
    inputs = {"images": torch.randn(4, 3, 16, 16), "domains": as_vectors(labels.roll(1, 0), 3)}
    optimiser = torch.optim.Adam(generator.module.parameters(), 1e-3)
    with Step(generator.module, Adversarial(RECIPE, critic), ()) as step:
        losses = [step(optimiser, inputs, labels, None)["loss"].item() for _ in range(8)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    assert all(parameter.grad is None for parameter in critic.parameters())


def test_a_discriminator_of_other_images_or_domains_is_refused(generator: Network, tmp_path: Path) -> None:
    path = tmp_path / "D.ckpt"
    torch.save(_critic().state_dict(), path)
    assert load_discriminator(str(path), generator).conv2.out_channels == 3
    for wrong in (_critic(domains=4), _critic(channels=1), generator.module):
        torch.save(wrong.state_dict(), path)
        with pytest.raises(NetworkError, match=r"no discriminator of images of 3 × 16 × 16 in 3 domains"):
            load_discriminator(str(path), generator)
