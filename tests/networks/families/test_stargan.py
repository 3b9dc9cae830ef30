from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from litdeploy.config.spec import TranslationInput
from litdeploy.errors import NetworkError
from litdeploy.inspection import FoundNetwork, inspect
from litdeploy.networks import load
from litdeploy.networks.families.stargan import discriminator, stargan
from litdeploy.networks.registry import identify

SMALL: dict[str, Any] = {"blocks": 3, "domains": 4, "width": 4, "in_channels": 3}


def _published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published code's names: one `main` for all layers, and running statistics that nothing uses."""

    def numbered(match: re.Match[str]) -> str:
        place = {"stem": 0, "blocks": 9, "head": 9 + SMALL["blocks"]}[match[1]]
        return f"main.{place + int(match[2])}."

    named = {re.sub(r"^(stem|blocks|head)\.(\d+)\.", numbered, name): value for name, value in state.items()}
    for name in [name for name, value in named.items() if name.endswith(".bias") and value.dim() == 1]:
        named[name.replace(".bias", ".running_mean")] = torch.full_like(named[name], 7.0)
    return named


def test_parameters_are_the_published_ones() -> None:
    """Choi et al., tables 4 and 5, with five domains and images of 128: counted from the tables by hand."""
    with torch.device("meta"):
        generator, critic = stargan(), discriminator()
    widths = [64, 128, 256]
    convolutions = (
        49 * 8 * 64 + 16 * (64 * 128 + 128 * 256) + 12 * 9 * 256**2 + 16 * (256 * 128 + 128 * 64) + 49 * 64 * 3
    )
    norms = 2 * (sum(widths) + 12 * 256 + 128 + 64)
    assert sum(p.numel() for p in generator.parameters()) == convolutions + norms
    strided = sum(
        16 * i * o + o for i, o in zip((3, 64, 128, 256, 512, 1024), (64, 128, 256, 512, 1024, 2048), strict=True)
    )
    assert sum(p.numel() for p in critic.parameters()) == strided + 9 * 2048 + 4 * 2048 * 5


def test_a_published_generator_is_recognised_and_its_running_statistics_are_not_used(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = stargan(**SMALL)
    torch.save(_published(network.state_dict()), tmp_path / "200000-G.ckpt")
    loaded = load(tmp_path / "200000-G.ckpt")
    assert (loaded.spec.name, loaded.spec.arguments) == ("stargan", SMALL)
    assert loaded.spec.input == TranslationInput(images=loaded.spec.input.images, domains=4)
    batch = loaded.example()
    # The published code leaves the generator in training mode, also for its samples.
    assert torch.equal(loaded.module(**batch), network.train()(**batch))


def test_a_published_discriminator_is_recognised(tmp_path: Path) -> None:
    critic = discriminator(layers=3, domains=4, width=4, image_size=16)
    name, reading = identify(critic.state_dict(), "here")
    assert name == "stargan-discriminator"
    assert reading.arguments == {"layers": 3, "domains": 4, "width": 4, "image_size": 16, "in_channels": 3}
    torch.save(critic.state_dict(), tmp_path / "200000-D.ckpt")
    loaded = load(tmp_path / "200000-D.ckpt")
    assert loaded.class_count() == 4
    assert loaded.module(loaded.example()).realness.shape == (2, 1, 2, 2)


def test_inspect_tells_how_shallow_a_student_can_be(tmp_path: Path) -> None:
    torch.save(_published(stargan(**SMALL).state_dict()), tmp_path / "G.pt")
    found = inspect(tmp_path / "G.pt")
    assert isinstance(found, FoundNetwork)
    assert found.title == "StarGAN-12"
    assert found.classes == 4
    assert found.student_depths == (8, 10, 12)
    assert [part.name for part in found.breakdown.parts] == ["blocks", "stem and head"]


def test_the_domain_reaches_the_image() -> None:
    torch.manual_seed(0)
    network = stargan(**SMALL)
    images = torch.randn(1, 3, 12, 16)
    first, second = (network(images, torch.eye(4)[index : index + 1]) for index in (0, 1))
    assert first.shape == images.shape
    assert first.abs().max() <= 1
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (stargan, {"blocks": 0}, "at least 1"),
        (discriminator, {"width": 0}, "at least 1"),
        (discriminator, {"layers": 4, "image_size": 24}, "fewer layers: 3"),
    ],
)
def test_what_is_no_such_network_is_refused(build: Any, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        build(**arguments)


def test_an_ordinary_network_with_a_main_is_not_taken_for_one() -> None:
    other = nn.Module()
    other.main = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    with pytest.raises(NetworkError, match="not a network that litdeploy recognizes"):
        identify(other.state_dict(), "here")
