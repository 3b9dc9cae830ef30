"""The recipe: what `compress` does. One YAML file a network and dataset in `recipes/`.

A file may hold, under `paper`, what the published settings are where they differ: `--recipe NAME:paper`.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from litdeploy.config import settings
from litdeploy.config.settings import Settings
from litdeploy.errors import SettingsError

Method = Literal["lit", "kd", "hint", "scratch", "born-again", "indistill", "slimming"]
Precision = Literal["auto", "fp32", "bf16"]
Choice = Literal["auto", "on", "off"]


class DataSettings(Settings):
    """Where the images or texts come from.

    Attributes:
        source: a hub id, a folder of class folders, a Parquet or CSV file, a folder of them, a packed file
            (`litdeploy data pack`), or `digits`.
        image_column, text_column, label_column: named where the columns' types and names do not tell.
        attributes: columns of which each says whether an image has that attribute, in the place of one label column: a
            generator's domains.
        image_size: (height, width) that images are resized to; None where all have the network's size already.
        text_length: characters or tokens that texts are cut or padded to; None: 1,014 characters, as published for
            VDCNN, and as many tokens as the network takes.
        tokenizer: folder of the tokeniser (tokenizer.json, vocab.txt, …) of a network that takes tokens, or a model's
            name in the hub's cache; None: that of the network `hf:FOLDER`.
        validation: share of the training images held out where the dataset has no validation split of its own.
        skip_bad: images that cannot be decoded and are left out; with one more there is an error.
        resident: decode everything once into device memory; None where that is decided by the memory there is.
    """

    source: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    attributes: tuple[str, ...] | None = Field(None, min_length=1)
    image_size: tuple[int, int] | None = None
    text_length: int | None = Field(None, ge=1)
    tokenizer: str | None = Field(None, min_length=1)
    validation: float = Field(0.05, gt=0, lt=1)
    skip_bad: int = Field(0, ge=0)
    resident: bool | None = None
    workers: int = Field(2, ge=0)

    @field_validator("source")
    @classmethod
    def _is_a_name(cls, source: str | None) -> str | None:
        if source and (not source.isprintable() or any(len(os.fsencode(part)) > 255 for part in Path(source).parts)):
            raise ValueError("no file, folder or dataset can have this name")
        return source

    @model_validator(mode="after")
    def _labels_or_attributes(self) -> DataSettings:
        if self.attributes is not None and self.label_column is not None:
            raise ValueError("label_column and attributes exclude one another; leave one of them out")
        if self.attributes is not None and len(set(self.attributes)) < len(self.attributes):
            raise ValueError("an attribute is named twice; leave it out once")
        return self


class Augmentation(Settings):
    """Of images: random crop after `padding` pixels of zeros on each side (0: none), and left-right flip."""

    padding: int = Field(4, ge=0)
    flip: bool = True


class Phase(Settings):
    """One phase of training.

    Attributes:
        epochs: passes over the training images.
        learning_rate: the highest that the schedule reaches.
        schedule: `one-cycle` (cosine up for the first 30 % of the steps, then down) or `step` (÷10 at each milestone).
        milestones: epochs of this phase after which a `step` schedule divides by ten.
    """

    epochs: int = Field(ge=0)
    learning_rate: float = Field(gt=0)
    schedule: Literal["one-cycle", "step"] = "one-cycle"
    milestones: tuple[int, ...] = ()


class BornAgainSettings(Settings):
    """Of method `born-again`.

    Attributes:
        generations: networks trained one after the other, each taught by the one before.
        by: `kd`, as published, or `lit`.
    """

    generations: int = Field(3, ge=1)
    by: Literal["kd", "lit"] = "kd"


class InDistillSettings(Settings):
    """Of method `indistill`.

    Attributes:
        student: a network as `--network` takes it, for the teacher's images and classes; it starts with new weights.
        share: share of the epochs spent on one layer after the other.
        then: what is learnt by after that, `kd` or `pkt`.
        pkt_weight, label_weight: of `pkt`'s own loss and of the labels' cross-entropy beside it; as published there are
            no labels, and the head is not trained.
    """

    student: str | None = None
    share: float = Field(0.17, gt=0, lt=1)
    then: Literal["kd", "pkt"] = "kd"
    pkt_weight: float = Field(30000.0, gt=0)
    label_weight: float = Field(1.0, ge=0)


class SlimmingSettings(Settings):
    """Of method `slimming`.

    Attributes:
        sparsity: weight of the sum of |γ| in the loss of the main phase.
        prune_ratio: share of the channels that is removed before fine-tuning.
    """

    sparsity: float = Field(1e-4, gt=0)
    prune_ratio: float = Field(0.4, gt=0, lt=1)


# Field with the settings of one method → that method.
_OF_METHOD = {"born_again": "born-again", "indistill": "indistill", "slimming": "slimming"}


class Recipe(Settings):
    """What `compress` does, complete with its defaults.

    The loss is `beta · L_KD + (1 − beta) · section_weight · Σ mse(S_i(T_{i−1}), T_i)` with
    `L_KD = alpha · CE + (1 − alpha) · temperature² · KL` (LIT, ICML 2019, section 3; `section_weight` 1 there).

    Attributes:
        network: the teacher's network, where its checkpoint does not tell.
        input_shape: (channels, height, width) of the teacher's images, or (length,) of its texts, likewise.
        normalise: `imagenet`, `cifar10`, … or `m1,…:s1,…`; None for what the checkpoint or the family says.
        method: `lit`, or one that it is measured against: `kd`, `hint`, `scratch`, `born-again`,
            `indistill`, `slimming`.
        born_again, indistill, slimming: settings of that method alone; None for its defaults.
        student_depth, student_blocks: the student; one of them. Several depths are a chain: each student is the next
            one's teacher, and trains for all epochs of the recipe.
        init: `copy` (evenly spaced blocks of the teacher) or `fresh`; None for the method's own.
        main, finetune: the two phases. Methods with a single phase train for the epochs of both, as `main` says.
        compile: the step and the teacher through `torch.compile`; `auto` where it pays in the epochs there are.
        feature_cache: views of each image whose teacher's features are kept; `auto` where it pays and fits.
        discriminator: a file of weights; a generator is then fine-tuned against it, and not by distillation.
        domain_weight, cycle_weight: of that loss (λ_cls and λ_rec of StarGAN, equation 6).
        teacher_weight: in it, of the mean absolute difference to the teacher's image; 0: equation 6 alone.
        optimiser: `sgd` with `momentum`, or `adamw` with `betas` (Loshchilov & Hutter, ICLR 2019).
        hint_share: share of the epochs that `hint` spends on its hint, before distilling.
        batch_size: images a step, of all ranks together.
        parallel: how several ranks share the LIT phase: the images of each batch, or the sections (for beta 0).
        batch_norm: whether each rank normalises by its part of the batch, or all by the whole.
    """

    network: str | None = None
    input_shape: tuple[int, ...] | None = None
    normalise: str | None = None
    data: DataSettings = DataSettings()
    augmentation: Augmentation = Augmentation()
    method: Method = "lit"
    born_again: BornAgainSettings | None = None
    indistill: InDistillSettings | None = None
    slimming: SlimmingSettings | None = None
    student_depth: int | tuple[int, ...] | None = None
    student_blocks: dict[str, int] | None = None
    init: Literal["copy", "fresh"] | None = None
    main: Phase = Phase(epochs=9, learning_rate=0.1)
    finetune: Phase = Phase(epochs=1, learning_rate=0.01)
    discriminator: str | None = None
    domain_weight: float = Field(1.0, ge=0)
    cycle_weight: float = Field(10.0, ge=0)
    teacher_weight: float = Field(100.0, ge=0)
    optimiser: Literal["sgd", "adamw"] = "sgd"
    hint_share: float = Field(0.2, gt=0, lt=1)
    batch_size: int = Field(128, ge=2)
    alpha: float = Field(0.1, ge=0, le=1)
    temperature: float = Field(4.0, gt=0)
    beta: float = Field(0.5, ge=0, le=1)
    section_weight: float = Field(3.0, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(5e-4, ge=0)
    precision: Precision = "auto"
    compile: Choice = "auto"
    feature_cache: Literal["off", "auto"] | Annotated[int, Field(ge=1)] = "auto"
    parallel: Literal["data", "sections"] = "data"
    batch_norm: Literal["per-rank", "synchronised"] = "per-rank"
    seed: int = Field(0, ge=0)

    @field_validator("student_depth", mode="before")
    @classmethod
    def _shallower_and_shallower(cls, depth: Any) -> Any:
        """One depth, or a chain of at least two."""
        chain = tuple(depth) if isinstance(depth, list | tuple) else (depth,)
        if chain == (None,):
            return None
        if not chain or any(isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in chain):
            raise ValueError(
                "a depth is a whole number of at least 1, as in 20, and a chain a list of them, as in 17,9"
            )
        if any(later >= former for former, later in pairwise(chain)):
            descending = ",".join(map(str, sorted(set(chain), reverse=True)))
            raise ValueError(
                "each student of a chain is shallower than the one before, which teaches it; give --student-depth "
                f"{descending}"
            )
        return chain if len(chain) > 1 else chain[0]

    @model_validator(mode="after")
    def _one_student(self) -> Recipe:
        if self.student_depth is not None and self.student_blocks is not None:
            raise ValueError("student_depth and student_blocks are two ways to say the same; keep one")
        return self

    @model_validator(mode="after")
    def _independent_sections(self) -> Recipe:
        if self.parallel == "sections" and self.method != "lit":
            raise ValueError(f"parallel 'sections' is for method 'lit', and not {self.method!r}; give --parallel data")
        if self.parallel == "sections" and self.beta:
            raise ValueError(
                f"parallel 'sections' needs beta 0, and it is {self.beta:g}: otherwise the sections learn from the "
                "student's own chain too, which runs through all of them; give --beta 0, or --parallel data"
            )
        return self

    @model_validator(mode="after")
    def _who_is_fine_tuned(self) -> Recipe:
        if self.discriminator is not None and self.method != "lit":
            raise ValueError(
                f"discriminator is of method 'lit', whose fine-tuning it is for, and the method is {self.method!r}; "
                "leave --discriminator out, or give --method lit"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_its_method(self) -> Recipe:
        for field, method in _OF_METHOD.items():
            if getattr(self, field) is not None and self.method != method:
                raise ValueError(
                    f"the settings {field} are those of method {method!r}, and the method is {self.method!r}; leave "
                    f"them out, or give --method {method}"
                )
        return self

    @property
    def depths(self) -> tuple[int, ...]:
        """Of the students, in the order in which they are trained; none where no depth is named."""
        depth = self.student_depth
        return depth if isinstance(depth, tuple) else () if depth is None else (depth,)

    @property
    def epochs(self) -> int:
        """Epochs of both phases together, of one student."""
        return self.main.epochs + self.finetune.epochs

    def with_epochs(self, epochs: int) -> Recipe:
        """The same recipe in `epochs` epochs: both phases and their milestones scaled by one factor."""
        factor = epochs / self.epochs
        finetune = round(self.finetune.epochs * factor)
        return self.model_copy(
            update={
                "main": _scaled(self.main, epochs - finetune, factor),
                "finetune": _scaled(self.finetune, finetune, factor),
            }
        )

    def with_(self, **changes: Any) -> Recipe:
        """The same with some fields changed, checked again. A method's settings go with it: another one has its own.

        Raises:
            SettingsError: a value that the field does not take.
        """
        other = changes.get("method", self.method) != self.method
        values = self.model_dump(mode="json", exclude_defaults=True, exclude=set(_OF_METHOD) if other else None)
        for name, change in changes.items():
            values[name] = {**values.get(name, {}), **change} if name in _OF_METHOD else change
        return settings.parse(Recipe, values, "command line")


def _scaled(phase: Phase, epochs: int, factor: float) -> Phase:
    milestones = tuple(round(milestone * factor) for milestone in phase.milestones)
    return phase.model_copy(update={"epochs": epochs, "milestones": milestones})


def read_recipe(name_or_path: str | Path) -> Recipe:
    """Reads a recipe by name (`cifar10-resnet`) or path; `NAME:paper` with the settings that it has under `paper`.

    Raises:
        SettingsError: see `settings.read`; also a recipe without any epoch.
    """
    recipe = settings.read(Recipe, name_or_path, "recipes", variants=("paper",))
    if recipe.epochs < 1:
        raise SettingsError(f"{name_or_path}: main.epochs and finetune.epochs are both 0; nothing would be trained.")
    return recipe
