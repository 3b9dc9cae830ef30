"""Translation: an image and the domains that it shall have → an image; compared with the teacher's by PSNR and SSIM.

Labels are int64: of exclusive domains one number an image (N), of attributes 0 or 1 for each (N, K).

Shape suffixes: N images, K domains, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdeploy.batch import Batch, forward, size_of
from litdeploy.config.spec import AnyInput, InputSpec, NetworkSpec, TranslationInput
from litdeploy.config.target import Tolerance
from litdeploy.errors import DataError, RunnerError, StudentError
from litdeploy.files import write_whole
from litdeploy.storage.records import MOST_DB, BatchParity, Likeness
from litdeploy.tasks.task import Batches, Curve, Inference, ScoreRow, Task, largest_differences, preferred_split

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03
_LEAST_PIXELS = 64  # of an image on the sample sheet; smaller ones are enlarged by a whole factor
_GAP, _HEAD, _SIDE = 2, 18, 56
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


class Translation(Task[Likeness]):
    """Images in another domain, compared with the teacher's: PSNR and SSIM."""

    name = "translation"
    score = Likeness
    output = "images"
    output_name = "translated"
    makes = "makes images"
    needs_labels = True
    needs_reference = True
    repeats = False  # each step asks for other domains
    any_size = True
    samples = 6
    advice = (
        "Give --method lit --beta 0, and for the fine-tuning the teacher's discriminator: --discriminator FILE (or a "
        "recipe whose `finetune` has 0 epochs)."
    )
    measure = "likeness"
    heading = "Size and likeness"
    note = (
        "PSNR and SSIM: of the student’s images to the teacher’s, for the same domains; the PSNR of all values "
        "together, the SSIM as the mean over the images."
    )
    side_by_side = "Likeness of each student’s images to its teacher’s"
    curves = (Curve("psnr", "Validation PSNR, dB", "PSNR of validation images to the teacher's", "dB"),)

    def class_count(self, sizes: Sequence[int | str], spec: AnyInput | None) -> int | None:
        return spec.domains if spec and tuple(sizes) == spec.shape else None

    def output_shape(self, spec: AnyInput, classes: int | str) -> tuple[int | str, ...]:
        return spec.shape

    def check_classes(
        self, source: str, classes: Sequence[str], attributes: bool, spec: NetworkSpec, wanted: int
    ) -> None:
        if len(classes) != wanted:
            raise DataError(
                f"{source} has {len(classes)} domains ({', '.join(classes[:5])}{', …' * (len(classes) > 5)}), and "
                f"{spec.name} translates to {wanted}. Give --data the folder of domain folders that it was trained "
                "on, or name its attributes in order: --attributes A,B,…"
            )

    def inputs(self, inputs: Batch, labels: Tensor | None, spec: AnyInput, first: int = 0) -> Batch:
        """Images, and for each other domains than its own: see `others`."""
        assert labels is not None
        return _with_domains(inputs, others(labels, spec.domains, first), spec)

    def training_inputs(self, inputs: Batch, labels: Tensor, spec: AnyInput) -> Batch:
        """Images, and for each the domains of another: see `swapped`."""
        return _with_domains(inputs, swapped(labels), spec)

    def check_objective(self, learns_by: str, what: str, network: str) -> None:
        super().check_objective("logits" if learns_by == "output" else learns_by, what, network)

    def soft_loss(self, student: Batch, teacher: Batch, temperature: float, inputs: Batch | None) -> Tensor:
        """None: a generator learns by its sections and by a discriminator. See `check_objective`."""
        raise StudentError(f"images have no logits to distil. {self.advice}")

    def key(self, score: Likeness) -> float:
        return score.psnr

    def write_samples(
        self,
        path: Path,
        teacher: nn.Module,
        student: nn.Module,
        inputs: Batch,
        labels: Tensor,
        spec: AnyInput,
        classes: Sequence[str],
    ) -> bool:
        """A column for the input and one for each domain, two rows an image: the teacher's above the student's.

        For attributes a column shows the image with that attribute inverted, and the others unchanged.
        """
        try:
            from PIL import Image, ImageDraw
        except ImportError:
            return False
        assert isinstance(spec, TranslationInput)
        images_NCHW = inputs["images"] if isinstance(inputs, dict) else inputs
        count = len(images_NCHW)
        rows = []
        for network in (teacher, student):
            columns = [images_NCHW, *(_translated(network, images_NCHW, each) for each in _wanted(labels, spec))]
            rows.append([_pixels(column, spec.images) for column in columns])
        _, height, width = spec.images.shape
        factor = max(1, -(-_LEAST_PIXELS // min(height, width)))
        cell_h, cell_w = height * factor + _GAP, width * factor + _GAP
        sheet = Image.new("RGB", (_SIDE + cell_w * len(rows[0]), _HEAD + 2 * cell_h * count), _PAPER)
        pen = ImageDraw.Draw(sheet)
        for column, name in enumerate(("input", *classes)):
            pen.text((_SIDE + cell_w * column + 2, 3), name[: cell_w // 7], fill=_INK)
        for index in range(count):
            for role, (label, columns_NHWC) in enumerate(zip(("teacher", "student"), rows, strict=True)):
                top = _HEAD + cell_h * (2 * index + role)
                pen.text((4, top + cell_h // 2 - 6), label, fill=_INK)
                for column, pixels_NHWC in enumerate(columns_NHWC):
                    tile = Image.fromarray(pixels_NHWC[index].numpy()).resize((width * factor, height * factor), 0)
                    sheet.paste(tile, (_SIDE + cell_w * column, top))
        with write_whole(path) as temporary:
            sheet.save(temporary, "png")
        return True

    def evaluate(
        self, run: Inference, batches: Batches, spec: AnyInput, reference: Inference | None = None
    ) -> Likeness:
        """PSNR and SSIM of the network's images to the reference's. See `Task.evaluate`."""
        assert reference is not None
        assert spec.images is not None
        sums: Tensor | None = None
        images = 0
        with torch.no_grad():
            for batch, _ in batches:
                expected, found = (each(batch) for each in (reference, run))
                assert isinstance(expected, Tensor)
                assert isinstance(found, Tensor)
                if expected.shape != found.shape:
                    raise RunnerError(
                        f"images of {tuple(found.shape)} cannot be compared with images of {tuple(expected.shape)}: "
                        "the files are not of one network. Export the student again, or name its own teacher: "
                        "--teacher FILE"
                    )
                both = torch.stack([each(expected, found, spec.images).sum() for each in (squared_error, ssim)])
                sums = both if sums is None else sums + both
                images += size_of(batch)
        if sums is None:
            raise DataError("there are no images to compare on: the split is empty. Give --data a dataset with images.")
        square, similar = (sums / images).tolist()
        return _likeness(square, similar, images)

    def compare(
        self, expected: Batch, found: Batch, batch_size: int, tolerance: Tolerance, spec: AnyInput
    ) -> BatchParity:
        """PSNR and SSIM of the candidate's images to the reference's, at least the tolerance's."""
        assert isinstance(expected, Tensor)
        assert isinstance(found, Tensor)
        assert spec.images is not None
        expected_NCHW, found_NCHW = expected.double().cpu(), found.double().cpu()
        absolute, relative = largest_differences(expected_NCHW, found_NCHW)
        near = None if absolute is None else likeness_of(expected_NCHW, found_NCHW, spec.images)
        return BatchParity(
            batch_size=batch_size,
            images=len(expected_NCHW),
            max_absolute=absolute,
            max_relative=relative,
            top1=None,
            likeness=near,
            within=near is not None and near.psnr >= tolerance.psnr and near.ssim >= tolerance.ssim,
        )

    def split(self, teacher: Mapping[str, Likeness], student: Mapping[str, Likeness]) -> str | None:
        return preferred_split(student)

    def figure(self, score: Likeness | None) -> str:
        return "–" if score is None else score.summary()

    def rows(self, teacher: Mapping[str, Likeness], student: Mapping[str, Likeness]) -> list[ScoreRow]:
        rows = []
        for split, near in sorted(student.items()):
            rows.append(ScoreRow(f"PSNR to the teacher, {split}", "–", f"{near.psnr:.1f} dB", "–"))
            rows.append(ScoreRow(f"SSIM to the teacher, {split}", "–", f"{near.ssim:.4f}", "–"))
        return rows

    def headline(self, teacher: Mapping[str, Likeness], student: Mapping[str, Likeness]) -> tuple[str, str, str] | None:
        split = self.split(teacher, student)
        if split is None:
            return None
        near = student[split]
        return "Likeness", f"{near.psnr:.1f} dB", f"PSNR, SSIM {near.ssim:.4f}, {split}"

    def verdict(self, teacher: Mapping[str, Likeness], student: Mapping[str, Likeness], classes: int = 0) -> str:
        split = self.split(teacher, student)
        assert split is not None  # without a score no report knows that images are made
        near = student[split]
        return (
            f"; its images have a PSNR of {near.psnr:.1f} dB and an SSIM of {near.ssim:.4f} to the teacher's "
            f"({split} split)"
        )


# Domains.


def as_vectors(labels: Tensor, domains: int) -> Tensor:
    """Labels as a generator takes them: float32 (N, K), 0 or 1.

    Args:
        labels: int64; of exclusive domains one number an image (N), of attributes 0 or 1 for each (N, K).
    """
    return (F.one_hot(labels, domains) if labels.dim() == 1 else labels).float()


def swapped(labels: Tensor) -> Tensor:
    """Labels to train for: each image gets those of the one before it.

    In batches of a drawn order that is a drawn permutation of the labels, as the published code has it.
    """
    return labels.roll(1, 0)


def others(labels: Tensor, domains: int, first: int = 0) -> Tensor:
    """Labels to measure by, the same each time: of exclusive domains each image in turn gets another one than its own,
    of attributes those of the image before it.

    Args:
        first: position of the first of them in its split.
    """
    if labels.dim() == 2:
        return swapped(labels)
    turn_N = torch.arange(first, first + len(labels), device=labels.device) % max(1, domains - 1)
    return (labels + 1 + turn_N) % domains


def _with_domains(inputs: Batch, wanted: Tensor, spec: AnyInput) -> Batch:
    assert isinstance(inputs, Tensor)
    return {"images": inputs, "domains": as_vectors(wanted, spec.domains).to(inputs.dtype)}


# Images against images.


def likeness_of(expected_NCHW: Tensor, found_NCHW: Tensor, spec: InputSpec) -> Likeness:
    """PSNR and SSIM of images to images, both normalized as `spec` says. See `Translation.evaluate`."""
    square = squared_error(expected_NCHW, found_NCHW, spec).mean().item()
    similar = ssim(expected_NCHW, found_NCHW, spec).mean().item()
    return _likeness(square, similar, len(expected_NCHW))


def decibels(square: float) -> float:
    """PSNR of a mean squared difference of values between 0 and 1: −10 · log10, at most `MOST_DB`."""
    if not math.isfinite(square):
        return -MOST_DB
    return MOST_DB if square <= 10 ** (-MOST_DB / 10) else max(-MOST_DB, -10 * math.log10(square))


def _likeness(square: float, similar: float, images: int) -> Likeness:
    # If both are equal, rounding may leave an SSIM just above 1.
    ssim = max(-1.0, min(1.0, similar)) if math.isfinite(similar) else -1.0
    return Likeness(psnr=decibels(square), ssim=ssim, images=images)


def squared_error(expected_NCHW: Tensor, found_NCHW: Tensor, spec: InputSpec) -> Tensor:
    """Mean squared difference of each image (N), float64, of values between 0 and 1."""
    return (_values(found_NCHW, spec) - _values(expected_NCHW, spec)).square().mean((1, 2, 3))


def ssim(expected_NCHW: Tensor, found_NCHW: Tensor, spec: InputSpec) -> Tensor:
    """Structural similarity of each image (N), float64 (Wang et al., "Image Quality Assessment: From Error Visibility
    to Structural Similarity", 2004): a Gaussian window of 11×11 with σ 1.5 wherever it fits whole, mean over all places
    and channels. For smaller images the window is smaller.
    """
    x_NCHW, y_NCHW = _values(expected_NCHW, spec), _values(found_NCHW, spec)
    smallest = min(x_NCHW.shape[2:])
    window_11HW = _gaussian(min(_WINDOW, smallest - 1 + smallest % 2), x_NCHW)

    def local(values_NCHW: Tensor) -> Tensor:
        n, c, h, w = values_NCHW.shape
        return F.conv2d(values_NCHW.reshape(n * c, 1, h, w), window_11HW)

    mean_x, mean_y = local(x_NCHW), local(y_NCHW)
    var_x, var_y = local(x_NCHW.square()) - mean_x.square(), local(y_NCHW.square()) - mean_y.square()
    covariance = local(x_NCHW * y_NCHW) - mean_x * mean_y
    c1, c2 = _K1**2, _K2**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    )
    return similarity.reshape(len(expected_NCHW), -1).mean(1)


def _gaussian(size: int, like: Tensor) -> Tensor:
    places = torch.arange(size, device=like.device, dtype=like.dtype) - (size - 1) / 2
    weights = torch.exp(-places.square() / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    return torch.outer(weights, weights)[None, None]


def _values(images_NCHW: Tensor, spec: InputSpec) -> Tensor:
    """Values between 0 and 1, if the network keeps to them; float64."""
    mean_C11, std_C11 = (
        torch.tensor(each, device=images_NCHW.device, dtype=torch.float64).view(-1, 1, 1)
        for each in (spec.mean, spec.std)
    )
    return images_NCHW.double() * std_C11 + mean_C11


# The sample sheet.


def _wanted(labels: Tensor, spec: TranslationInput) -> list[Tensor]:
    """Domains to ask for, for each column: float32 (N, K)."""
    own_NK = as_vectors(labels, spec.domains)
    if labels.dim() == 1:
        return [torch.eye(spec.domains, device=labels.device)[each].expand_as(own_NK) for each in range(spec.domains)]
    turned = []
    for each in range(spec.domains):
        wanted_NK = own_NK.clone()
        wanted_NK[:, each] = 1 - wanted_NK[:, each]
        turned.append(wanted_NK)
    return turned


@torch.no_grad()
def _translated(network: nn.Module, images_NCHW: Tensor, wanted_NK: Tensor) -> Tensor:
    translated: Tensor = forward(network, {"images": images_NCHW, "domains": wanted_NK})
    return translated


def _pixels(images_NCHW: Tensor, spec: InputSpec) -> Tensor:
    """RGB, uint8 (N, H, W, 3), on the CPU."""
    mean_C11, std_C11 = (
        torch.tensor(values, device=images_NCHW.device).view(-1, 1, 1) for values in (spec.mean, spec.std)
    )
    values_NCHW = (255 * (images_NCHW.float() * std_C11 + mean_C11)).round().clamp(0, 255).to(torch.uint8)
    if spec.shape[0] == 1:
        values_NCHW = values_NCHW.expand(-1, 3, -1, -1)
    return values_NCHW.permute(0, 2, 3, 1).cpu().contiguous()
