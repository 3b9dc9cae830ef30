"""The recipe: how a student is trained. One YAML file per network and dataset in `recipes/`.

A file may hold published settings that differ from its own under the key `paper`: `--recipe NAME:paper`.

The fields' descriptions are also the help of the command line's options.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from litdeploy.config import settings
from litdeploy.config.settings import Settings
from litdeploy.config.spec import TaskName
from litdeploy.errors import SettingsError

Choice = Literal["auto", "on", "off"]


Pooling = Literal["mean", "cls", "max", "lasttoken", "mean_sqrt_len_tokens"]


# Fields that say which labels are used; each of them excludes the others.
_OF_LABELS = {"label_column", "labels", "attributes"}


class DataSettings(Settings):
    """The dataset: where its images or texts are, and how to read them."""

    source: str | None = Field(
        None,
        description="The dataset: a folder of class folders or of images alone, a Parquet, CSV or JSON-lines file, a "
        "text file (a text a line), a folder of these, a hub id, a packed file (litdeploy data pack), or digits.",
    )
    image_column: str | None = Field(None, description="Column with the images, if its type does not show it.")
    text_column: str | None = Field(None, description="Column with the texts, if its name does not show it.")
    label_column: str | None = Field(None, description="Column with the labels, if its name does not show it.")
    labels: Literal["auto", "none"] = Field(
        "auto", description="Labels: auto uses those that the dataset has; none leaves them unused."
    )
    attributes: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Columns that say whether an image has an attribute, instead of a label column: the domains of a "
        "generator.",
    )
    image_size: tuple[int, int] | None = Field(
        None, description="Resize images to this height and width; by default they must have the network's size."
    )
    text_length: int | None = Field(
        None,
        ge=1,
        description="Cut or pad texts to this many characters or tokens; by default 1,014 characters, as published "
        "for VDCNN, or the most tokens that the network takes.",
    )
    tokenizer: str | None = Field(
        None,
        min_length=1,
        description="Folder of the tokenizer (tokenizer.json, vocab.txt, …) or a name in the hub's cache, for a "
        "network that takes tokens; by default that of the network hf:FOLDER.",
    )
    validation: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="Share of the training data held out for validation if the dataset has no validation split.",
    )
    skip_bad: int = Field(
        0, ge=0, description="Skip up to this many images that cannot be decoded, and name each; one more is an error."
    )
    resident: bool | None = Field(
        None, description="Decode all data once into device memory; by default decided from the free memory."
    )
    workers: int = Field(2, ge=0, description="Processes that decode images if they do not fit in memory.")

    def merged(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that are not the defaults, with some changed; how to use the labels is changed as one."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        if changes.keys() & _OF_LABELS:
            values = {name: value for name, value in values.items() if name not in _OF_LABELS}
        return {**values, **changes}

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
        for field, named in (("label_column", self.label_column), ("attributes", self.attributes)):
            if self.labels == "none" and named is not None:
                raise ValueError(f"labels 'none' and {field} exclude one another; leave one of them out")
        return self


# The crop of the published settings for CIFAR, whose images have 32 pixels.
_MOST_PADDING = 4


class Augmentation(Settings):
    """Augmentation of images: a random crop and a left-right flip. What is None depends on the images."""

    padding: int | None = Field(
        None,
        ge=0,
        description="Pixels of zeros added on each side of an image before the random crop; 0 for no crop; by default "
        "an eighth of the size, and 4 at most.",
    )
    flip: bool | None = Field(
        None,
        description="Flip half of the images left to right; by default color images, unless all classes are single "
        "characters: a mirrored digit or letter is another one.",
    )

    def filled(self, shape: tuple[int, ...], classes: Sequence[str]) -> Augmentation:
        """Return the augmentation with everything that it leaves to the images.

        Args:
            shape: (channels, height, width) of an image.
            classes: their names; empty without labels.
        """
        padding = min(_MOST_PADDING, min(shape[1:]) // 8) if self.padding is None else self.padding
        characters = bool(classes) and all(len(name) == 1 for name in classes)
        flip = shape[0] > 1 and not characters if self.flip is None else self.flip
        return Augmentation(padding=padding, flip=flip)

    def summary(self) -> str:
        """The augmentation in a few words, if it is `filled`."""
        crop = f"crop with {self.padding} pixel{'s' * (self.padding > 1)} of padding" if self.padding else "no crop"
        return f"{crop}, {'flip' if self.flip else 'no flip'}"


class Phase(Settings):
    """One phase of training."""

    epochs: int = Field(ge=0, description="Passes over the training data.")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Highest learning rate of the schedule; by default 0.1 with sgd and 0.0005 with adamw, in the "
        "fine-tuning 0.01 and 0.0001.",
    )
    schedule: Literal["one-cycle", "step"] = Field(
        "one-cycle",
        description="one-cycle: cosine up for the first 30 % of the steps, then down; step: ÷10 at each milestone.",
    )
    milestones: tuple[int, ...] = Field(
        (), description="Epochs of this phase after which a step schedule divides the learning rate by ten."
    )

    @property
    def rate(self) -> float:
        """The learning rate, of a recipe that is `filled`."""
        assert self.learning_rate is not None, "Recipe.filled comes first"
        return self.learning_rate


class BornAgainSettings(Settings):
    """Settings of method `born-again` alone."""

    generations: int = Field(
        3, ge=1, description="Networks that born-again trains one after another, each taught by the one before."
    )
    by: Literal["kd", "lit"] = Field(
        "kd", description="How born-again trains each generation: kd, as published, or lit."
    )


class InDistillSettings(Settings):
    """Settings of method `indistill` alone."""

    student: str | None = Field(
        None,
        description="The student of indistill, as --network takes it (resnet20,width=8), for the teacher's images and "
        "classes; it starts from new weights.",
    )
    share: float = Field(0.17, gt=0, lt=1, description="Share of the epochs spent on one layer after another.")
    then: Literal["kd", "pkt"] = Field("kd", description="How the student is trained after that.")
    pkt_weight: float = Field(30000.0, gt=0, description="Weight of the PKT loss.")
    label_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of the labels' cross-entropy in addition to PKT; the published loss has none, and does not "
        "train the head.",
    )


class SlimmingSettings(Settings):
    """Settings of method `slimming` alone."""

    sparsity: float = Field(
        1e-4, gt=0, description="Weight of the batch norms' scales, Σ|γ|, in slimming's loss of the main phase."
    )
    prune_ratio: float = Field(
        0.4, gt=0, lt=1, description="Share of the channels that slimming removes before fine-tuning."
    )


Optimizer = Literal["sgd", "adamw"]

# Learning rate of the main phase, that of the fine-tuning, and weight decay, if a recipe does not say.
_DEFAULTS: dict[Optimizer, tuple[float, float, float]] = {"sgd": (0.1, 0.01, 5e-4), "adamw": (5e-4, 1e-4, 0.01)}

# Field with the settings of one method → that method.
_OF_METHOD = {"born_again": "born-again", "indistill": "indistill", "slimming": "slimming"}
# Fields with settings of their own, which a change of some of them leaves unchanged.
_MERGED = (*_OF_METHOD, "augmentation")


class Recipe(Settings):
    """How a student is trained, complete with its defaults.

    The loss is `beta · L_KD + (1 − beta) · section_weight · Σ mse(S_i(T_{i−1}), T_i)` with
    `L_KD = alpha · CE + (1 − alpha) · temperature² · KL` (LIT, ICML 2019, section 3; `section_weight` 1 there).
    """

    network: str | None = Field(
        None,
        description="The network, if its file does not name it: resnet56, timm:NAME, hf:NAME, package.module:function.",
    )
    input_shape: tuple[int, ...] | None = Field(
        None,
        description="Channels, height and width of an image, as in 3,32,32, the length of a text, or the shape of "
        "another sample, as in 1,16000, if the file does not give it.",
    )
    pooling: Pooling | None = Field(
        None,
        description="Pooling of a text encoder's hidden states to one vector a text, if its folder states none; by "
        "default the mean over a text's tokens.",
    )
    normalise: str | None = Field(
        None,
        description="Normalization of images: imagenet, cifar10, cifar100, half, none, or m1,m2,m3:s1,s2,s3 on the "
        "scale 0–1; by default the file's or the network family's.",
    )
    task: TaskName | None = Field(
        None,
        description="What the network's output means: classification, embedding, dense, tokens, translation or tree; "
        "by default as its file says, or as its output's structure and shape show.",
    )
    data: DataSettings = DataSettings()
    augmentation: Augmentation = Augmentation()
    method: Literal["lit", "kd", "hint", "scratch", "born-again", "indistill", "slimming"] = Field(
        "lit",
        description="The training method: lit, or one to compare it with: kd, hint, scratch, born-again, indistill, "
        "slimming.",
    )
    born_again: BornAgainSettings | None = None
    indistill: InDistillSettings | None = None
    slimming: SlimmingSettings | None = None
    student_depth: int | tuple[int, ...] | None = Field(
        None,
        description="Depth of the student; litdeploy inspect lists the possible ones. Several, as in 17,9, are a "
        "chain: each student teaches the next, and each trains for all epochs.",
    )
    student_blocks: dict[str, int] | None = Field(
        None,
        description="Blocks per section of the student, as in layer1=3,layer3=2, instead of a depth; other sections "
        "stay whole.",
    )
    blocks: Literal["spaced", "influence"] = Field(
        "spaced",
        description="Which blocks the student copies: spaced (evenly), or influence (those that change their input the "
        "most, measured on the training data); of kinds that alternate, as many as their share.",
    )
    sections: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Into how many sections to divide one long stack of uniform blocks, as of a BERT; each learns on "
        "the teacher's own input. auto: one for every three blocks.",
    )
    init: Literal["copy", "fresh"] | None = Field(
        None,
        description="Initial weights of the student: copy (evenly spaced blocks of the teacher) or fresh; by default "
        "the method's own.",
    )
    main: Phase = Field(
        Phase(epochs=9),
        description="The main phase. Methods with a single phase train it for the epochs of both.",
    )
    finetune: Phase = Field(Phase(epochs=1), description="The fine-tuning after the main phase.")
    discriminator: str | None = Field(
        None,
        description="Weights of a generator's discriminator: fine-tune the student against it instead of distilling.",
    )
    domain_weight: float = Field(
        1.0, ge=0, description="Weight of the domain loss in that fine-tuning (λ_cls of StarGAN, equation 6)."
    )
    cycle_weight: float = Field(
        10.0, ge=0, description="Weight of the reconstruction loss in that fine-tuning (λ_rec of StarGAN, equation 6)."
    )
    teacher_weight: float = Field(
        100.0,
        ge=0,
        description="Weight of the mean absolute difference from the teacher's image in that fine-tuning; 0 leaves "
        "equation 6 alone.",
    )
    optimiser: Literal["auto", Optimizer] = Field(
        "auto",
        description="sgd with momentum, or adamw with betas (Loshchilov & Hutter, ICLR 2019); auto: adamw for networks "
        "with layer norms, such as transformers, and sgd for others.",
    )
    hint_share: float = Field(
        0.2, gt=0, lt=1, description="Share of the epochs that method hint spends on its hint before distilling."
    )
    batch_size: int = Field(128, ge=2, description="Images or texts per step, all processes together.")
    alpha: float = Field(
        0.1, ge=0, le=1, description="Weight of the labels in distillation, 0 to 1; the rest is the teacher's."
    )
    temperature: float = Field(4.0, gt=0, description="Temperature of the softmax in distillation.")
    beta: float = Field(
        0.5, ge=0, le=1, description="Weight of distillation in LIT's loss, 0 to 1; 0 trains the sections alone."
    )
    section_weight: float = Field(3.0, gt=0, description="Factor of the sections' mean squared errors in LIT's loss.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of sgd.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="Decay rates of adamw's two moments."
    )
    weight_decay: float | None = Field(
        None, ge=0, description="Weight decay of the optimizer; by default 0.0005 with sgd and 0.01 with adamw."
    )
    keep: Literal["best", "last"] = Field(
        "best",
        description="Which student is delivered: the best on the validation split of all epochs and of the cut before "
        "them, or the last.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Precision of training; auto: bf16 if the device supports it."
    )
    compile: Choice = Field(
        "auto", description="torch.compile of the step and the teacher; auto: if it saves time over all epochs."
    )
    feature_cache: Literal["off", "auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="Views of each image whose teacher features are cached; auto: as many as save time and fit.",
    )
    parallel: Literal["data", "sections"] = Field(
        "data",
        description="How the processes of a launcher share LIT: data (parts of each batch) or sections (needs "
        "--beta 0).",
    )
    batch_norm: Literal["per-rank", "synchronised"] = Field(
        "per-rank",
        description="Batch statistics: per-rank (of each process's part of the batch) or synchronised (of the whole "
        "batch).",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Random seed for initialization, order and augmentation.")

    @field_validator("student_depth", mode="before")
    @classmethod
    def _descending(cls, depth: Any) -> Any:
        """Accept one depth, or a chain of at least two."""
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
            raise ValueError(f"parallel 'sections' is for method 'lit', not {self.method!r}; give --parallel data")
        if self.parallel == "sections" and self.beta:
            raise ValueError(
                f"parallel 'sections' needs beta 0, and it is {self.beta:g}: otherwise the sections learn from the "
                "student's own chain too, which runs through all of them; give --beta 0, or --parallel data"
            )
        return self

    @model_validator(mode="after")
    def _discriminator_of_lit(self) -> Recipe:
        if self.discriminator is not None and self.method != "lit":
            raise ValueError(
                f"discriminator is of method 'lit', whose fine-tuning uses it, and the method is {self.method!r}; "
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
        """Depths of the students, in the order in which they are trained; empty if none is named."""
        depth = self.student_depth
        return depth if isinstance(depth, tuple) else () if depth is None else (depth,)

    @property
    def epochs(self) -> int:
        """Epochs of both phases together, of one student."""
        return self.main.epochs + self.finetune.epochs

    def with_epochs(self, epochs: int) -> Recipe:
        """Return the recipe in `epochs` epochs: both phases and their milestones scaled by one factor."""
        factor = epochs / self.epochs
        finetune = round(self.finetune.epochs * factor)
        return self.model_copy(
            update={
                "main": _scaled(self.main, epochs - finetune, factor),
                "finetune": _scaled(self.finetune, finetune, factor),
            }
        )

    def filled(self, optimizer: Optimizer) -> Recipe:
        """Return the recipe with everything that it leaves to the optimizer.

        Args:
            optimizer: if the recipe names none.
        """
        optimizer = optimizer if self.optimiser == "auto" else self.optimiser
        main, finetune, weight_decay = _DEFAULTS[optimizer]
        return self.model_copy(
            update={
                "optimiser": optimizer,
                "main": self.main.model_copy(update={"learning_rate": self.main.learning_rate or main}),
                "finetune": self.finetune.model_copy(update={"learning_rate": self.finetune.learning_rate or finetune}),
                "weight_decay": weight_decay if self.weight_decay is None else self.weight_decay,
            }
        )

    def filled_as(self, run: Recipe, labeled: bool) -> Recipe:
        """Return the recipe with everything that it leaves to the network and the data, as the recipe of a run has it:
        they are equal if the run is one of this recipe.

        Args:
            labeled: whether the run used labels; without, their weight is 0.
        """
        images = {**run.augmentation.model_dump(), **self.augmentation.model_dump(exclude_none=True)}
        main, finetune = self.main.learning_rate, self.finetune.learning_rate
        return self.model_copy(
            update={
                "optimiser": run.optimiser if self.optimiser == "auto" else self.optimiser,
                "main": self.main.model_copy(update={"learning_rate": main or run.main.learning_rate}),
                "finetune": self.finetune.model_copy(update={"learning_rate": finetune or run.finetune.learning_rate}),
                "weight_decay": run.weight_decay if self.weight_decay is None else self.weight_decay,
                "augmentation": Augmentation(**images),
                "alpha": self.alpha if labeled else 0.0,
            }
        )

    def with_(self, **changes: Any) -> Recipe:
        """Return the recipe with some fields changed, validated again.

        Another method drops the settings of the old one.

        Raises:
            SettingsError: a value that the field does not accept.
        """
        other = changes.get("method", self.method) != self.method
        values = self.model_dump(mode="json", exclude_defaults=True, exclude=set(_OF_METHOD) if other else None)
        for name, change in changes.items():
            values[name] = {**values.get(name, {}), **dict(change)} if name in _MERGED else change
        return settings.parse(Recipe, values, "command line")


def _scaled(phase: Phase, epochs: int, factor: float) -> Phase:
    milestones = tuple(round(milestone * factor) for milestone in phase.milestones)
    return phase.model_copy(update={"epochs": epochs, "milestones": milestones})


def read_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe by name (`cifar10-resnet`) or path; `NAME:paper` applies the settings under its key `paper`.

    Raises:
        SettingsError: see `settings.read`; also a recipe with no epochs.
    """
    recipe = settings.read(Recipe, name_or_path, "recipes", variants=("paper",))
    if recipe.epochs < 1:
        raise SettingsError(f"{name_or_path}: main.epochs and finetune.epochs are both 0; nothing would be trained.")
    return recipe
