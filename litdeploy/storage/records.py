"""Records of a run: the manifest, and those that manifests, reports and sidecars are made of."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from litdeploy.config.recipe import DataSettings, Recipe
from litdeploy.config.spec import NetworkSpec, Noun, TaskName
from litdeploy.config.target import Tolerance
from litdeploy.errors import BundleError

SCHEMA_VERSION = 1
MOST_DB = 200.0
_LATEST_OPSET = 1000


class Record(BaseModel):
    """Base of all records: immutable, unknown keys refused."""

    # JSON has no NaN; the loss of a diverged network is one, and its record must be readable.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Accuracy(Record):
    """Accuracy on one split.

    Attributes:
        top1: share of images whose highest logit is the label's, 0–1.
        loss: mean cross-entropy, in nats.
        images: number of images in the mean.
    """

    top1: float
    loss: float
    images: int

    @property
    def correct(self) -> float | None:
        """Share of samples answered as labeled, 0–1; None for a score that compares with no labels."""
        return self.top1

    def summary(self) -> str:
        """The score in a few words."""
        return f"{100 * self.top1:.2f} %"

    def details(self) -> str:
        """What a terminal shows after the summary; empty if nothing is left to say."""
        return f"loss {self.loss:.4f}"

    def row(self, split: str) -> dict[str, float]:
        """The score's entries in a line of metrics.jsonl."""
        return {f"{split}_top1": self.top1, f"{split}_loss": self.loss}


class Likeness(Record):
    """How near images come to a reference's, on one split: a student's to its teacher's.

    Attributes:
        psnr: peak signal-to-noise ratio of the mean squared difference of all values, in dB; `MOST_DB` if all are
            equal, `-MOST_DB` if one is not finite.
        ssim: structural similarity, mean over the images; 1 if all are equal, −1 if a value is not finite.
        images: number of images compared.
    """

    psnr: float = Field(ge=-MOST_DB, le=MOST_DB)
    ssim: float = Field(ge=-1, le=1)
    images: int = Field(ge=1)

    @property
    def correct(self) -> float | None:
        """None: the images are compared with a reference's and not with labels."""
        return None

    def summary(self) -> str:
        """The score in a few words."""
        return f"PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.4f}"

    def details(self) -> str:
        """Empty: the summary has it all."""
        return ""

    def row(self, split: str) -> dict[str, float]:
        """The score's entries in a line of metrics.jsonl."""
        return {f"{split}_psnr": self.psnr, f"{split}_ssim": self.ssim}


class Measures(Record):
    """What a task measures on one split, the main measure first; the task says what each is called and which direction
    is better (`Task.measures`).

    Attributes:
        task: whose measures they are.
        values: name → value, without those that are not finite; a measure of one tensor is named `NAME/TENSOR`.
        images: number of samples.
    """

    task: TaskName
    values: dict[str, float] = Field(min_length=1)
    images: int = Field(ge=1)

    @property
    def correct(self) -> float | None:
        """None: there is no share of samples answered as labeled."""
        return None

    def summary(self) -> str:
        """The score in a few words."""
        name, value = next(iter(self.values.items()))
        return f"{name} {value:.4g}"

    def details(self) -> str:
        """The other measures."""
        return ", ".join(f"{name} {value:.4g}" for name, value in list(self.values.items())[1:])

    def row(self, split: str) -> dict[str, float]:
        """The score's entries in a line of metrics.jsonl."""
        return {f"{split}_{name}": value for name, value in self.values.items()}


def _kind(score: Any) -> str:
    for record, name, key in ((Measures, "measures", "values"), (Likeness, "likeness", "psnr")):
        if isinstance(score, record) or (isinstance(score, dict) and key in score):
            return name
    return "accuracy"


# How good a network is, by its task's metric. The fields decide which one it is, so that files need no tag.
Score = Annotated[
    Annotated[Accuracy, Tag("accuracy")] | Annotated[Likeness, Tag("likeness")] | Annotated[Measures, Tag("measures")],
    Discriminator(_kind),
]


class ScoredRecord(Record):
    """A record with scores by split (`validation`, `test`), each task's under its own key.

    Attributes:
        accuracy: of a classifier.
        likeness: of a student that makes images, to its teacher's.
        measures: of every other task, and of a classifier without labels.
    """

    accuracy: dict[str, Accuracy]
    likeness: dict[str, Likeness] = Field(default_factory=dict)
    measures: dict[str, Measures] = Field(default_factory=dict)

    @property
    def scores(self) -> dict[str, Score]:
        """Split → score, whichever task's."""
        return {**self.accuracy, **self.likeness, **self.measures}

    @staticmethod
    def keyed(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
        """Scores as keyword arguments for this record."""
        return {
            "accuracy": {split: score for split, score in scores.items() if isinstance(score, Accuracy)},
            "likeness": {split: score for split, score in scores.items() if isinstance(score, Likeness)},
            "measures": {split: score for split, score in scores.items() if isinstance(score, Measures)},
        }


class BatchParity(Record):
    """How far two runners are apart at one batch size.

    Attributes:
        images: number of samples compared.
        max_absolute: largest difference of two output values; None if a value of either is NaN or infinite.
        max_relative: the same, divided by the largest magnitude in the reference's output.
        top1: share of samples on which both give the same class; None for images.
        likeness: how near the candidate's images come to the reference's; None for logits.
        cosines: least and mean cosine of the candidate's embeddings to the reference's; None for other outputs.
        tensor: name of the tensor that has the largest differences, among several; None: there is one output.
        within: whether the tolerance is kept.
    """

    batch_size: int
    images: int
    max_absolute: float | None
    max_relative: float | None
    top1: float | None
    likeness: Likeness | None = None
    cosines: tuple[float, float] | None = None
    tensor: str | None = None
    within: bool

    def agreement(self) -> str:
        """The task's own figure: `99.90%`, PSNR and SSIM, or cosines; `–` if the outputs could not be compared."""
        if self.top1 is not None:
            return f"{self.top1:.2%}"
        if self.cosines is not None:
            return "cosine at least {:.5f}, mean {:.5f}".format(*self.cosines)
        return self.likeness.summary() if self.likeness else "–"

    def alike(self) -> str:
        """How alike both are, before "samples"."""
        if self.top1 is not None:
            return f"same class on {self.agreement()} of"
        if self.likeness is None and self.cosines is None:
            return "over" if self.max_absolute is not None else "not comparable over"
        return f"{self.agreement()} over"


class LabeledParity(Record):
    """Accuracy of both sides on the same labeled samples.

    Attributes:
        lost: samples that the reference has right, minus those that the candidate has right.
        within: whether no more were lost than the tolerance allows.
    """

    reference: Accuracy
    candidate: Accuracy
    lost: int
    within: bool


class Parity(Record):
    """How far a candidate is from its reference.

    Attributes:
        reference, candidate: names of the runners.
        tolerance: the limits.
        accuracy: on labeled samples; None if there were none.
        within: whether the limits are kept, at every batch size.
    """

    reference: str
    candidate: str
    tolerance: Tolerance
    batches: tuple[BatchParity, ...]
    accuracy: LabeledParity | None = None
    within: bool

    @property
    def top1(self) -> float | None:
        """Share of all samples, over all batch sizes, on which both give the same class; None for images.

        The limit applies to it and not to each batch size's: calls of one sample see few samples.
        """
        return same_class(self.batches)

    def with_labels(self, found: LabeledParity | None) -> Parity:
        """The same, judged by the accuracy too; unchanged if none was measured."""
        if found is None:
            return self
        return self.model_copy(update={"accuracy": found, "within": self.within and found.within})

    def limits(self) -> str:
        """The limits that apply."""
        limits = self.tolerance
        near = f"{limits.atol:g} + {limits.rtol:g} of the largest value"
        if any(batch.cosines for batch in self.batches):
            return f"{near}, cosine at least {limits.cosine:g}"
        if self.top1 is None and not any(batch.likeness for batch in self.batches):
            return near
        if self.top1 is None:
            return f"PSNR at least {limits.psnr:g} dB, SSIM at least {limits.ssim:g}"
        return f"{limits.atol:g} + {limits.rtol:g} of the largest logit, same class on at least {limits.top1:.2%}" + (
            f", accuracy at most {limits.accuracy:.2%} lower" if self.accuracy is not None else ""
        )

    def summary(self) -> str:
        """Figures, a line for each batch size, and the limits."""
        lines = []
        for each in self.batches:
            if each.max_absolute is None or each.max_relative is None:
                difference = "a value is NaN or infinite"
            else:
                difference = f"largest difference {each.max_absolute:.2e} ({each.max_relative:.2e} of the largest)"
            difference += f" in {each.tensor}" if each.tensor else ""
            lines.append(
                f"  batch {each.batch_size}: {difference}, {each.alike()} {each.images} samples"
                + ("" if each.within else "  ← beyond the limit")
            )
        if self.top1 is not None and self.top1 < self.tolerance.top1:
            lines.append(f"  same class on {self.top1:.2%} of all  ← beyond the limit")
        if self.accuracy is not None:
            both = self.accuracy
            lines.append(
                f"  accuracy on {both.reference.images} samples: {both.reference.top1:.2%} → {both.candidate.top1:.2%}"
                + ("" if both.within else "  ← beyond the limit")
            )
        return "\n".join([*lines, f"  limit: {self.limits()}"])


def same_class(batches: Sequence[BatchParity]) -> float | None:
    """Share of all samples on which both give the same class; None for images."""
    same = [batch.top1 * batch.images for batch in batches if batch.top1 is not None]
    return sum(same) / sum(batch.images for batch in batches) if same else None


class Difference(Record):
    """One side compared with another, on the same test samples.

    Attributes:
        error: of `compression` (teacher → student) or of `conversion` (student → artefact).
        reference, candidate: `teacher`, `student` or an artefact's key.
        precision: of the candidate.
        max_absolute, max_relative: largest difference of two output values, and that over the largest value; over all
            batch sizes; None if a value is NaN or infinite.
        top1: share of samples on which both give the same class; None for images.
        likeness: how near the candidate's images come to the reference's; None for logits.
        measures: the candidate's, compared with the reference; None for images and labeled logits.
        reference_accuracy, candidate_accuracy: on the whole test split; None for images.
        parity: figures at each batch size, and the limits; None for compression, which has none.
    """

    error: Literal["compression", "conversion"]
    reference: str
    candidate: str
    precision: str
    max_absolute: float | None
    max_relative: float | None
    top1: float | None
    likeness: Likeness | None = None
    measures: Measures | None = None
    reference_accuracy: Accuracy | None
    candidate_accuracy: Accuracy | None
    parity: Parity | None = None

    @property
    def score(self) -> Score | None:
        """The candidate's score on the test split."""
        return self.candidate_accuracy or self.likeness or self.measures

    @staticmethod
    def figures(batches: Sequence[BatchParity], reference: Score | None, candidate: Score | None) -> dict[str, Any]:
        """Figures over all batch sizes, and both scores, as keyword arguments for a `Difference`."""
        absolute, relative = ([getattr(batch, key) for batch in batches] for key in ("max_absolute", "max_relative"))
        return {
            "max_absolute": None if None in absolute else max(absolute),
            "max_relative": None if None in relative else max(relative),
            "top1": same_class(batches),
            "likeness": candidate if isinstance(candidate, Likeness) else None,
            "measures": candidate if isinstance(candidate, Measures) else None,
            "reference_accuracy": reference if isinstance(reference, Accuracy) else None,
            "candidate_accuracy": candidate if isinstance(candidate, Accuracy) else None,
        }


class TeacherRecord(Record):
    """The teacher: its path, the SHA-256 of the file, and its spec."""

    path: str
    sha256: str
    spec: NetworkSpec


class Ancestor(Record):
    """A network of the chain that a student comes from: its depth, the SHA-256 of its file, and split → score."""

    depth: int
    sha256: str
    metrics: dict[str, Score]

    def summary(self) -> str:
        """Its depth, and its score on the test split."""
        tested = self.metrics.get("test")
        return f"depth {self.depth}" + (f" ({tested.summary()})" if tested else "")


def descent(lineage: Sequence[Ancestor]) -> str:
    """Through whom a chain's student learned, and that it is measured against the first of them, as a sentence."""
    steps = ", ".join(each.summary() for each in lineage)
    return f"In a chain: {steps}, each the next one's teacher. The student is measured against the first."


class DataRecord(Record):
    """The dataset: source, fingerprint of its contents, what it holds, and the number of samples used of each split.

    Attributes:
        labeled: whether its samples have labels, and they were used.
        tokenizer: SHA-256 of everything that decides its texts' tokens; None if they did not become tokens.
    """

    noun: Noun = "image"
    source: str
    fingerprint: str
    labeled: bool = True
    tokenizer: str | None = None
    images: dict[str, int]
    test_is_held_out: bool = False


class RunRecord(Record):
    """How the training ran. `seconds` is wall-clock time; `images_per_second` counts training images.

    Attributes:
        device: of the first rank.
        ranks: number of processes of the training.
        delivered: the whole epochs after which the student had its weights, 0 for the cut before any; None: after the
            last, in older manifests.
    """

    started: str
    seconds: float
    images_per_second: float
    epochs: int
    device: str
    precision: str
    versions: dict[str, str]
    ranks: int = 1
    delivered: int | None = None


class Artefact(Record):
    """One exported file: path relative to the bundle, SHA-256, precision, library versions and what else matters."""

    path: str
    sha256: str
    precision: str = Field(pattern=r"^(fp32|fp16|bf16|int8)$")
    versions: dict[str, str]
    details: dict[str, Any]

    @property
    def runs_here(self) -> bool:
        """Whether the file runs on this machine; an engine built ahead of time for other GPUs does not."""
        return "gpu" not in self.details or self.details["gpu"] is not None

    def opset(self) -> int:
        """The ONNX operator set that it was exported in.

        Raises:
            BundleError: its details do not say.
        """
        found = self.details.get("opset")
        if not isinstance(found, int) or not 1 <= found <= _LATEST_OPSET:
            raise BundleError(f"{self.path}: the manifest does not say its operator set. Export it again.")
        return found

    @property
    def command(self) -> str | None:
        """The command that made it; None if the file says something else than `litdeploy export …`.

        It is shown to be typed again, and a stranger may have written anything into the file.
        """
        command = self.details.get("command")
        try:
            words = shlex.split(command) if isinstance(command, str) and command.isprintable() else []
        except ValueError:
            return None
        ours = words[:2] in (["litdeploy", "export"], ["litdeploy", "profile"])
        return shlex.join(words) if ours else None


# The student before its first step: its key in a manifest's metrics, and the phase of its line in metrics.jsonl.
CUT = "cut"


class Manifest(Record):
    """All about a bundle.

    Attributes:
        status: `interrupted` if the user stopped the run before its last epoch.
        teacher: the one that the student is measured against; of a chain, the first.
        lineage: for a chain's student, from that teacher to the student that taught it; else empty.
        discriminator_sha256: of the file that the student was fine-tuned against; None if there was none.
        carried: file name in `transformers/` → SHA-256.
        functions: `loss` or `metric` → name of the user's own function in its place.
        metrics: `teacher`, `student` or `cut` (the student before its first step) → split → score; the teacher has none
            if scores compare with it. The test split is used once, after the last epoch.
        warnings: what the user should know about the trained student.
    """

    schema_version: int = SCHEMA_VERSION
    litdeploy: str
    status: Literal["complete", "interrupted"]
    teacher: TeacherRecord
    lineage: tuple[Ancestor, ...] = ()
    student: NetworkSpec
    student_sha256: str
    carried: dict[str, str] = {}
    discriminator_sha256: str | None = None
    recipe: Recipe
    data: DataRecord
    functions: dict[str, str] = {}
    run: RunRecord
    metrics: dict[str, dict[str, Score]]
    warnings: tuple[str, ...] = ()
    artefacts: dict[str, Artefact] = {}


class Exports(Record):
    """All about the exported files of a network that was not compressed.

    Attributes:
        network: where its weights are.
        carried: file name in `transformers/` → SHA-256.
        data: whose samples the newest files were compared on; None: random inputs.
    """

    schema_version: int = SCHEMA_VERSION
    litdeploy: str
    network: TeacherRecord
    carried: dict[str, str] = {}
    data: DataSettings | None = None
    artefacts: dict[str, Artefact] = {}
