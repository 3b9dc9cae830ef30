"""How good made images are beside real ones: Fréchet inception distance (FID) and Inception score.

Shape suffixes: N images, C channels, H height, W width, E numbers of a feature.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litdeploy.config.spec import InputSpec
from litdeploy.errors import CheckpointError, DataError, DependencyError, RunnerError, SettingsError
from litdeploy.evaluation.retrieval import embedder
from litdeploy.networks import load
from litdeploy.runtime.device import ieee_float32
from litdeploy.storage.checkpoint import read_checkpoint
from litdeploy.storage.records import Record

INCEPTION = "inception"
# As torch-fidelity names the file that it would download.
_INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
# Inception score is published as the mean over ten parts of 5,000 images; smaller parts lower it.
_PARTS, _SMALLEST_PART = 10, 500

# Images (N, C, H, W), normalised → features (N, E) and logits (N, classes).
Features = Callable[[Tensor], tuple[Tensor, Tensor]]


class Quality(Record):
    """Of the images of one network.

    Attributes:
        fid: Fréchet distance of the features of made and real images, as of two normal distributions; 0 at best.
        inception_score: from 1 to the number of classes, the higher the better.
        inception_score_std: over the parts of the images that it is the mean of; None where there is one part.
    """

    fid: float
    inception_score: float
    inception_score_std: float | None

    def told(self) -> str:
        """For people."""
        spread = "" if self.inception_score_std is None else f" ± {self.inception_score_std:.2f}"
        return f"FID {self.fid:.4f}, Inception score {self.inception_score:.2f}{spread}"


class Judge:
    """Gathers the features of real and of made images; `torchmetrics` computes what they come to.

    Raises:
        DependencyError: torchmetrics is not installed.
    """

    def __init__(self) -> None:
        self._classes = _torchmetrics()
        self._fid: Any = None
        self._score: Any = None
        self._made = 0

    def real(self, features_NE: Tensor) -> None:
        """Takes the features of a batch of real images."""
        self._start(features_NE)
        self._fid.update(features_NE.double(), real=True)

    def made(self, features_NE: Tensor, logits: Tensor) -> None:
        """Takes the features and logits (N, classes) of a batch of made images."""
        self._start(features_NE)
        self._fid.update(features_NE.double(), real=False)
        self._score.update(logits.double())
        self._made += len(logits)

    def _start(self, features_NE: Tensor) -> None:
        if self._fid is not None:
            return
        # They are handed features, and not images: one run of the network serves both.
        given = nn.Identity()
        given.num_features = torch.tensor(features_NE.shape[1])
        fid, score = self._classes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the logits are kept, which is meant
            self._fid = fid(feature=given).to(features_NE.device)
            self._score = score(feature=given).to(features_NE.device)

    def found(self) -> Quality:
        """What the images come to; of each kind two or more must have been seen."""
        self._score.splits = max(1, min(_PARTS, self._made // _SMALLEST_PART))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.default_generator.manual_seed(0)  # the parts are drawn
            warnings.simplefilter("ignore")  # that one part has no deviation
            mean, deviation = (value.item() for value in self._score.compute())
            # Rounding may leave the distance of equal sets just below 0.
            fid = max(0.0, self._fid.compute().item())
        return Quality(
            fid=fid, inception_score=mean, inception_score_std=deviation if math.isfinite(deviation) else None
        )


@contextmanager
def open_features(name: str, images: InputSpec, device: torch.device) -> Iterator[Features]:
    """The network by whose features images are judged.

    Args:
        name: weights of a classifier of such images, or `inception`: the Inception network of the published figures, by
            torch-fidelity, whose weights must lie in torch's cache. Nothing is downloaded.
        images: that shall be judged, as they are normalised. They are rounded to pixels first, as they would be saved.

    Yields:
        Images → features and logits. It raises a RunnerError where an image or a feature is not finite.

    Raises:
        CheckpointError, NetworkError: see `networks.load`.
        DataError: Inception's weights are not there.
        DependencyError: torch-fidelity is not installed, or cannot be imported.
        SettingsError: the network is no classifier of such images.
    """
    mean_C11, std_C11 = _statistics(images, device)
    with _of_pixels(name, images, device) as of_pixels:

        @torch.no_grad()
        def features(images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
            if not images_NCHW.isfinite().all():
                raise RunnerError("--quality: images were made that are not finite. Train the network again.")
            values_NCHW = images_NCHW.float() * std_C11 + mean_C11
            with ieee_float32(device):
                found = of_pixels((255 * values_NCHW).round().clamp(0, 255).byte())
            if not all(each.isfinite().all() for each in found):
                raise RunnerError(f"--quality {name}: gives features that are not finite. Name another network.")
            return found

        yield features


@contextmanager
def _of_pixels(name: str, images: InputSpec, device: torch.device) -> Iterator[Features]:
    """As `open_features`, of uint8 images."""
    if name == INCEPTION:
        if images.shape[0] != 3:
            raise SettingsError(
                f"--quality {INCEPTION}: takes images of 3 channels, and those to judge are of {_told(images)}. Name a "
                "classifier of such images: --quality FILE"
            )
        yield _inception().to(device)
        return
    loaded = load(name)
    spec = loaded.spec.input
    if not isinstance(spec, InputSpec):
        raise SettingsError(
            f"--quality {name}: takes {spec.summary()}, and is no classifier of images. Name one: --quality FILE"
        )
    if spec.shape != images.shape:
        raise SettingsError(
            f"--quality {name}: takes images of {_told(spec)}, and those to judge are of {_told(images)}. Name a "
            "classifier of such images, as `litdeploy train` makes one: --quality FILE"
        )
    mean_C11, std_C11 = _statistics(spec, device)
    with embedder(loaded.module.to(device)) as embed:
        yield lambda pixels_NCHW: embed((pixels_NCHW.float() / 255 - mean_C11) / std_C11)


def _told(spec: InputSpec) -> str:
    return " × ".join(map(str, spec.shape))


def _statistics(spec: InputSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    mean_C11, std_C11 = (torch.tensor(each, device=device).view(-1, 1, 1) for each in (spec.mean, spec.std))
    return mean_C11, std_C11


def _inception() -> Any:
    """torch-fidelity's Inception: uint8 images of any size → (features (N, 2048), logits without bias)."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # the latter by a torchvision of another torch
        raise DependencyError(
            f"--quality {INCEPTION}: needs torch-fidelity, with the torchvision of this torch ({error}). Install them: "
            "pip install torch-fidelity torchvision"
        ) from None
    path = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE
    if not path.is_file():
        raise DataError(
            f"--quality {INCEPTION}: its weights are not at {path}, and nothing is downloaded. Put them there, from "
            f"{_INCEPTION_URL}{_INCEPTION_FILE}, or name a classifier of such images: --quality FILE"
        )
    # torch-fidelity would run what a pickle says; what litdeploy's own reader takes says nothing.
    read_checkpoint(path)
    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    except RuntimeError as error:
        raise CheckpointError(f"{path}: are not Inception's weights ({str(error).splitlines()[0]}).") from None


def _torchmetrics() -> tuple[Any, Any]:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore
    except (ImportError, RuntimeError) as error:  # the latter by a torchvision of another torch
        raise DependencyError(
            f"--quality needs torchmetrics, and of torchvision none or this torch's ({error}). Install it: pip install "
            "'litdeploy[quality]'"
        ) from None
    return FrechetInceptionDistance, InceptionScore
