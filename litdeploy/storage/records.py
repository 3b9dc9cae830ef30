"""What is written of a run: its manifest, and the records that the manifest, reports and sidecars are made of."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from litdeploy.config.recipe import Recipe
from litdeploy.config.spec import NetworkSpec, Noun
from litdeploy.errors import BundleError

SCHEMA_VERSION = 1
MOST_DB = 200.0
_LATEST_OPSET = 1000


class Record(BaseModel):
    """Base of what the manifest holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Accuracy(Record):
    """Accuracy on one split.

    Attributes:
        top1: share of images whose highest logit is the label's, 0–1.
        loss: mean cross-entropy, in nats.
        images: how many images it is the mean of.
    """

    top1: float
    loss: float
    images: int

    def told(self) -> str:
        """For people."""
        return f"{100 * self.top1:.2f} %"

    def row(self, split: str) -> dict[str, float]:
        """What a line of metrics.jsonl has of it."""
        return {f"{split}_top1": self.top1, f"{split}_loss": self.loss}


class Likeness(Record):
    """How near images come to a reference's, on one split: a student's to its teacher's.

    Attributes:
        psnr: peak signal to noise ratio of the mean squared difference of all values, in dB; `MOST_DB` where all are
            equal, and that below zero where one is not finite.
        ssim: structural similarity, mean over the images; 1 where all are equal, −1 where a value is not finite.
        images: how many were compared.
    """

    psnr: float = Field(ge=-MOST_DB, le=MOST_DB)
    ssim: float = Field(ge=-1, le=1)
    images: int = Field(ge=1)

    def told(self) -> str:
        """For people."""
        return f"PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.4f}"

    def row(self, split: str) -> dict[str, float]:
        """What a line of metrics.jsonl has of it."""
        return {f"{split}_psnr": self.psnr, f"{split}_ssim": self.ssim}


def _kind(score: Any) -> str:
    return "likeness" if isinstance(score, Likeness) or (isinstance(score, dict) and "psnr" in score) else "accuracy"


# What a network is measured by: a classifier by its accuracy, one that makes images by how near they are to its
# teacher's.
Score = Annotated[
    Annotated[Accuracy, Tag("accuracy")] | Annotated[Likeness, Tag("likeness")],
    Discriminator(_kind),
]


class TeacherRecord(Record):
    """The teacher: where it was, the SHA-256 of the file, and what it is."""

    path: str
    sha256: str
    spec: NetworkSpec


class Ancestor(Record):
    """A network of the chain that a student comes from: its depth, the SHA-256 of its file, and split → accuracy, or
    its likeness to the first of the chain."""

    depth: int
    sha256: str
    metrics: dict[str, Score]

    def told(self) -> str:
        """For people: its depth, and what it came to on the test split."""
        tested = self.metrics.get("test")
        return f"depth {self.depth}" + (f" ({tested.told()})" if tested else "")


def descent(lineage: Sequence[Ancestor]) -> str:
    """For people: through whom a chain's student learnt, and that it is measured against the first of them."""
    steps = ", ".join(each.told() for each in lineage)
    return f"In a chain: {steps}, each the next one's teacher. The student is measured against the first."


class DataRecord(Record):
    """The dataset: source, fingerprint of its contents, what it holds, and how many of these in each split used.

    Attributes:
        tokenizer: SHA-256 of all by which its texts became tokens; None where they did not.
    """

    noun: Noun = "image"
    source: str
    fingerprint: str
    tokenizer: str | None = None
    images: dict[str, int]
    test_is_held_out: bool = False


class RunRecord(Record):
    """How the training ran. `seconds` is wall-clock time, `images_per_second` counts training images.

    Attributes:
        device: of the first rank.
        ranks: processes that shared the training.
    """

    started: str
    seconds: float
    images_per_second: float
    epochs: int
    device: str
    precision: str
    versions: dict[str, str]
    ranks: int = 1


class Artefact(Record):
    """One exported file: path relative to the bundle, SHA-256, precision, library versions and what else matters."""

    path: str
    sha256: str
    precision: str = Field(pattern=r"^(fp32|fp16|bf16|int8)$")
    versions: dict[str, str]
    details: dict[str, Any]

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
        """What was typed to make it; None where the file says something else than `litdeploy export …`.

        It is shown as what to type, and whoever wrote the file may have written anything.
        """
        command = self.details.get("command")
        try:
            words = shlex.split(command) if isinstance(command, str) and command.isprintable() else []
        except ValueError:
            return None
        ours = words[:2] in (["litdeploy", "export"], ["litdeploy", "profile"])
        return shlex.join(words) if ours else None


class Manifest(Record):
    """All that is known of a bundle.

    Attributes:
        status: `interrupted` when the run was stopped by its user before its last epoch.
        teacher: the one that the student is measured against; of a chain, the one that it began with.
        lineage: of a chain's student, from that teacher to the student that taught it; else nothing.
        discriminator_sha256: of the file that the student was fine-tuned against; None where there was none.
        carried: of the files in `transformers/`, by name: SHA-256.
        metrics: `teacher` or `student` → split → accuracy; of networks that make images only the student's likeness
            to its teacher. The test split is used once, after the last epoch.
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
    run: RunRecord
    metrics: dict[str, dict[str, Score]]
    artefacts: dict[str, Artefact] = {}
