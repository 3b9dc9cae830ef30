"""Quality of generated images compared with real ones: Fréchet inception distance (FID) and Inception score.

Shape suffixes: N images, C channels, H height, W width, E features.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litdeploy.batch import tensors_of
from litdeploy.config.recipe import DataSettings
from litdeploy.config.spec import InputSpec, TaskName
from litdeploy.data import check_against, normalised_batches, open_data
from litdeploy.errors import CheckpointError, DataError, DependencyError, RunnerError, SettingsError
from litdeploy.evaluation.evaluate import open_file, teacher_of, what_on
from litdeploy.evaluation.retrieval import embedder
from litdeploy.files import is_folder
from litdeploy.networks import NetworkName, load
from litdeploy.runtime import open_runner, resolve_device
from litdeploy.runtime.device import ieee_float32
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import read_checkpoint
from litdeploy.storage.records import Record
from litdeploy.tasks import task_of

INCEPTION = "inception"
# As torch-fidelity names the file that it would download.
_INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
# Inception score is published as the mean over ten parts of 5,000 images; smaller parts lower it.
_PARTS, _SMALLEST_PART = 10, 500

# Images (N, C, H, W), normalized → features (N, E) and logits (N, classes).
FeatureExtractor = Callable[[Tensor], tuple[Tensor, Tensor]]


class Quality(Record):
    """Quality of one network's images.

    Attributes:
        fid: Fréchet distance between the features of generated and real images, fitted by normal distributions; 0 is
            best.
        inception_score: from 1 to the number of classes; higher is better.
        inception_score_std: standard deviation over the parts of the images it averages; None if there is one part.
    """

    fid: float
    inception_score: float
    inception_score_std: float | None

    def summary(self) -> str:
        """Both scores, in one line."""
        spread = "" if self.inception_score_std is None else f" ± {self.inception_score_std:.2f}"
        return f"FID {self.fid:.4f}, Inception score {self.inception_score:.2f}{spread}"


class Judged(Record):
    """Quality of a network's images and of its teacher's, compared with the real images of one split.

    Attributes:
        judge: the network whose features are compared: a file, or `inception`.
        features: number of features per image.
        images: number of real images; as many are generated, each in another domain than its own.
        student: quality of the network's images.
        teacher: quality of the teacher's images; None if no teacher was given.
        notes: caveats about the figures.
    """

    judge: str
    features: int
    images: int
    student: Quality
    teacher: Quality | None
    notes: tuple[str, ...]


def evaluate_quality(
    path: str | Path,
    *,
    features: str,
    data: DataSettings | dict[str, Any] | str | None = None,
    split: str = "test",
    batch_size: int = 256,
    precision: str = "fp32",
    device: str = "auto",
    seed: int | None = None,
    network: NetworkName | None = None,
    normalise: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    task: TaskName | None = None,
    teacher: str | Path | None = None,
) -> Judged:
    """Measure the quality of a split's images translated to other domains, the same that `evaluate` compares.

    Args:
        path: weights, an exported file, or a bundle, whose student is measured.
        features: see `open_features`.
        teacher: weights to measure too; None: a bundle's own teacher, or none for a file.
        others: as for `evaluate`.

    Raises:
        LitdeployError: bad input; see `litdeploy.errors`.
    """
    path = Path(path)
    judges = [Judge()]
    bundle = Bundle(path) if is_folder(path) else None
    path, settings, seed = what_on(path, data, seed, split)
    where = resolve_device(device)
    runner, spec, domains = open_file(path, where, precision, network, normalise, input_shape, task)
    images = spec.input.images
    if task_of(spec).output != "images" or images is None:
        raise SettingsError(f"--quality {features}: judges made images, and {path} makes none. Leave it out.")
    with ExitStack() as opened:
        of = opened.enter_context(open_features(features, images, where))
        given = open_data(settings, where, seed)
        check_against(given, spec, domains)
        runners = [opened.enter_context(runner)]
        if bundle is not None or teacher is not None:
            reference = teacher_of(path, spec, bundle, teacher, network)
            runners.append(opened.enter_context(open_runner("eager", network=reference, device=where)))
            judges.append(Judge())
        count = size = 0
        for batch, _ in normalised_batches(getattr(given, split), spec.input, batch_size):
            real_NE, _ = of(tensors_of(batch)[0])
            for judge, each in zip(judges, runners, strict=True):
                judge.real(real_NE)
                made = each.run(batch)
                assert isinstance(made, Tensor)
                judge.made(*of(made))
            count, size = count + len(real_NE), real_NE.shape[1]
    if count < 2:
        raise DataError(
            f"--quality {features}: FID needs at least two images, but the {split} split has {count}. Give --data a "
            "dataset with a larger one."
        )
    found = [judge.found() for judge in judges]
    return Judged(
        judge=features,
        features=size,
        images=count,
        student=found[0],
        teacher=found[1] if len(found) > 1 else None,
        notes=_notes(count, size),
    )


def _notes(images: int, features: int) -> tuple[str, ...]:
    if images > features:
        return ()
    return (
        f"FID of {images} images with {features} features: the covariance is singular, which raises the FID. Use at "
        f"least {features + 1} images, and compare only with figures of the same number of images.",
    )


class Judge:
    """Accumulates features of real and generated images; torchmetrics computes the scores.

    Raises:
        DependencyError: torchmetrics is not installed.
    """

    def __init__(self) -> None:
        self._classes = _torchmetrics()
        self._fid: Any = None
        self._score: Any = None
        self._made = 0

    def real(self, features_NE: Tensor) -> None:
        """Add the features of a batch of real images."""
        self._start(features_NE)
        self._fid.update(features_NE.double(), real=True)

    def made(self, features_NE: Tensor, logits: Tensor) -> None:
        """Add the features and logits (N, classes) of a batch of generated images."""
        self._start(features_NE)
        self._fid.update(features_NE.double(), real=False)
        self._score.update(logits.double())
        self._made += len(logits)

    def _start(self, features_NE: Tensor) -> None:
        if self._fid is not None:
            return
        # The metrics receive features instead of images: one forward pass yields both.
        given = nn.Identity()
        given.num_features = torch.tensor(features_NE.shape[1])
        fid, score = self._classes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it keeps the logits, which is intended
            self._fid = fid(feature=given).to(features_NE.device)
            self._score = score(feature=given).to(features_NE.device)

    def found(self) -> Quality:
        """Compute the scores; at least two images of each kind must have been added."""
        self._score.splits = max(1, min(_PARTS, self._made // _SMALLEST_PART))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.default_generator.manual_seed(0)  # the parts are random
            warnings.simplefilter("ignore")  # one part has no deviation
            mean, deviation = (value.item() for value in self._score.compute())
            # Rounding may leave the distance of equal sets just below 0.
            fid = max(0.0, self._fid.compute().item())
        return Quality(
            fid=fid, inception_score=mean, inception_score_std=deviation if math.isfinite(deviation) else None
        )


@contextmanager
def open_features(name: str, images: InputSpec, device: torch.device) -> Iterator[FeatureExtractor]:
    """Open the network whose features are compared.

    Args:
        name: weights of a classifier of images of this shape, or `inception`: the Inception network of published
            figures, from torch-fidelity, whose weights must be in torch's cache. Nothing is downloaded.
        images: how the images are normalized. They are rounded to pixels first, as if saved.

    Yields:
        Images → features and logits. It raises a RunnerError if an image or a feature is not finite.

    Raises:
        CheckpointError, NetworkError: see `networks.load`.
        DataError: Inception's weights are missing.
        DependencyError: torch-fidelity is not installed, or cannot be imported.
        SettingsError: the network is not a classifier of images of this shape.
    """
    mean_C11, std_C11 = _statistics(images, device)
    with _of_pixels(name, images, device) as of_pixels:

        @torch.no_grad()
        def features(images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
            if not images_NCHW.isfinite().all():
                raise RunnerError("--quality: the network generated images that are not finite. Train it again.")
            values_NCHW = images_NCHW.float() * std_C11 + mean_C11
            with ieee_float32(device):
                found = of_pixels((255 * values_NCHW).round().clamp(0, 255).byte())
            if not all(each.isfinite().all() for each in found):
                raise RunnerError(f"--quality {name}: its features are not finite. Use another network.")
            return found

        yield features


@contextmanager
def _of_pixels(name: str, images: InputSpec, device: torch.device) -> Iterator[FeatureExtractor]:
    """As `open_features`, for uint8 images."""
    if name == INCEPTION:
        if images.shape[0] != 3:
            raise SettingsError(
                f"--quality {INCEPTION}: takes images of 3 channels, but the generated ones have {_sizes(images)}. "
                "Use a classifier of that shape: --quality FILE"
            )
        yield _inception().to(device)
        return
    loaded = load(name)
    spec = loaded.spec.input
    if not isinstance(spec, InputSpec):
        raise SettingsError(
            f"--quality {name}: takes {spec.summary()}, and is no classifier of images. Use one: --quality FILE"
        )
    if spec.shape != images.shape:
        raise SettingsError(
            f"--quality {name}: takes images of {_sizes(spec)}, but the generated ones have {_sizes(images)}. Use a "
            "classifier of that shape, such as `litdeploy train` makes: --quality FILE"
        )
    mean_C11, std_C11 = _statistics(spec, device)
    with embedder(loaded.module.to(device)) as embed:
        yield lambda pixels_NCHW: embed((pixels_NCHW.float() / 255 - mean_C11) / std_C11)


def _sizes(spec: InputSpec) -> str:
    return " × ".join(map(str, spec.shape))


def _statistics(spec: InputSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    mean_C11, std_C11 = (torch.tensor(each, device=device).view(-1, 1, 1) for each in (spec.mean, spec.std))
    return mean_C11, std_C11


def _inception() -> Any:
    """torch-fidelity's Inception: uint8 images of any size → (features (N, 2048), logits without bias)."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision does not match torch
        raise DependencyError(
            f"--quality {INCEPTION}: needs torch-fidelity and a torchvision that matches torch ({error}). Install "
            "them: pip install torch-fidelity torchvision"
        ) from None
    path = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE
    if not path.is_file():
        raise DataError(
            f"--quality {INCEPTION}: its weights are not at {path}, and nothing is downloaded. Copy them there from "
            f"{_INCEPTION_URL}{_INCEPTION_FILE}, or use a classifier of that shape: --quality FILE"
        )
    # torch-fidelity would run code in a pickle; a file that litdeploy's reader accepts contains none.
    read_checkpoint(path)
    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    except RuntimeError as error:
        raise CheckpointError(f"{path}: not Inception's weights ({str(error).splitlines()[0]}).") from None


def _torchmetrics() -> tuple[Any, Any]:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision does not match torch
        raise DependencyError(
            f"--quality needs torchmetrics, and torchvision, if installed, must match torch ({error}). Install it: "
            "pip install 'litdeploy[quality]'"
        ) from None
    return FrechetInceptionDistance, InceptionScore
