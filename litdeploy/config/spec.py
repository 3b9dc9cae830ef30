"""What rebuilds a network: its name, arguments, input and, for a student, the teacher's blocks that it kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from litdeploy.config.settings import Settings
from litdeploy.errors import SettingsError

# Mean and standard deviation of each channel of RGB / 255 on the training images.
NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


# 3 × 2364 × 2364: a file may claim any size, and a network is run on one image of it.
MOST_VALUES = 2**24
MOST_DOMAINS = 2**16
MOST_TENSORS = 64


@dataclass(frozen=True)
class Free:
    """A size that differs from call to call: 1 to `most`; None: no limit is known."""

    name: str
    most: int | None = None


@dataclass(frozen=True)
class InputTensor:
    """A tensor that a network takes.

    Attributes:
        name: of the input in an exported file; with several tensors, also of the parameter of the network's forward.
        dtype: `float32` or `int64`.
        shape: of one sample, without the batch.
        below: for int64, values are below this, and 0 or more.
        mask: whether it is 1 up to a text's end and 0 after it.
    """

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | Free, ...]
    below: int | None = None
    mask: bool = False


# What a network takes and a dataset holds, in messages.
Noun = Literal["image", "text", "sample"]

# What an output means: the rows of `litdeploy.tasks.TASKS`.
TaskName = Literal["classification", "embedding", "dense", "tokens", "translation", "tree"]


class _Input(Settings):
    """What the kinds of input have in common."""

    def metadata(self) -> dict[str, str]:
        """The input's entries in the metadata of an exported file; `input_of` reads them."""
        return {"input": self.model_dump_json()}

    def within(self, most: int | None) -> Self:
        """The same for texts of at most so many tokens; unchanged if its length is not free."""
        return self


class InputSpec(_Input):
    """One image: float32, (value / 255 − mean) / std per channel, NCHW.

    Attributes:
        shape: (channels, height, width).
        mean, std: one value for each channel, on the scale 0–1.
    """

    # Not a field: a spec without a kind is of images, as older files have it.
    kind: ClassVar[Literal["image"]] = "image"
    noun: ClassVar[Noun] = "image"
    task: ClassVar[TaskName] = "classification"
    domains: ClassVar[int] = 0
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @model_validator(mode="after")
    def _check(self) -> InputSpec:
        if min(self.shape) < 1:
            raise ValueError("every size of an input shape is at least 1")
        if math.prod(self.shape) > MOST_VALUES:
            raise ValueError(f"an image has at most {MOST_VALUES:,} values")
        if not len(self.mean) == len(self.std) == self.shape[0]:
            raise ValueError(f"mean and std need one value for each of the {self.shape[0]} channels")
        if min(self.std) <= 0:
            raise ValueError("a standard deviation is above 0")
        return self

    @property
    def images(self) -> InputSpec:
        """The images among the input: this."""
        return self

    @property
    def tensors(self) -> tuple[InputTensor, ...]:
        """The tensors that the network takes."""
        return (InputTensor("images", "float32", self.shape),)

    def override(self, normalise: str | None, input_shape: tuple[int, ...] | None, source: str) -> InputSpec:
        """The input with the user's `--normalise` and `--input-shape` applied.

        Raises:
            SettingsError: another number of channels, no such normalization, or an option for another kind of input.
        """
        shape = self.shape if input_shape is None else image_shape(input_shape, source)
        if shape[0] != self.shape[0]:
            raise SettingsError(f"{source}: takes {self.shape[0]} channels; --input-shape says {shape[0]}.")
        mean, std = parse_normalisation(normalise, shape[0]) if normalise else (self.mean, self.std)
        return InputSpec(shape=shape, mean=mean, std=std)

    def metadata(self) -> dict[str, str]:
        """The input's entries in the metadata of an exported file; `input_of` reads them. Older than other inputs'."""
        values = {"input_shape": self.shape, "mean": self.mean, "std": self.std}
        return {key: json.dumps(value) for key, value in values.items()}

    def summary(self) -> str:
        """The input in a few words."""
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{' × '.join(map(str, self.shape))}, mean ({mean}), std ({std})"


class TokenInput(_Input):
    """A text as token ids with an attention mask, int64 (N, length) both, as BERT's kin take them.

    Attributes:
        length: tokens of a text; the most, if it is not fixed.
        vocabulary: ids are 0 to one less.
        fixed: whether every text is padded to `length`; else any length up to it is accepted.
        pad: the id after the end of a text; the attention mask is 0 there.
    """

    noun: ClassVar[Noun] = "text"
    task: ClassVar[TaskName] = "classification"
    domains: ClassVar[int] = 0
    images: ClassVar[None] = None
    kind: Literal["tokens"] = "tokens"
    length: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    fixed: bool = False
    pad: int = Field(0, ge=0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one tensor of one sample; of the longest."""
        return (self.length,)

    def within(self, most: int | None) -> Self:
        """The same for texts of at most so many tokens; unchanged if every text has one length."""
        if most is None or self.fixed or most >= self.length:
            return self
        return self.model_copy(update={"length": most})

    @property
    def tensors(self) -> tuple[InputTensor, ...]:
        """The tensors that the network takes."""
        size = self.length if self.fixed else Free("length", self.length)
        return (
            InputTensor("input_ids", "int64", (size,), below=self.vocabulary),
            InputTensor("attention_mask", "int64", (size,), below=2, mask=True),
        )

    def summary(self) -> str:
        """The input in a few words."""
        return f"{'' if self.fixed else 'up to '}{self.length} tokens of {self.vocabulary:,}"

    def override(self, normalise: str | None, input_shape: tuple[int, ...] | None, source: str) -> TokenInput:
        """The input with the user's `--input-shape` applied: texts of one fixed length. See `InputSpec.override`."""
        length = _overridden_length(self, self.length, normalise, input_shape, source)
        return self if length is None else self.model_copy(update={"length": length, "fixed": True})


# Conneau et al. (EACL 2017), section 3: with padding and unknown characters, 69 ids.
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/|_#$%^&*~`+=<>()[]{} "


class CharacterInput(_Input):
    """A text as character ids, int64 (N, length): 0 after its end, 1 for what is not in the alphabet, then its places.

    Attributes:
        length: characters of a text; longer ones are cut.
        alphabet: ASCII; capitals count as small letters if they are not in it.
    """

    noun: ClassVar[Noun] = "text"
    task: ClassVar[TaskName] = "classification"
    domains: ClassVar[int] = 0
    images: ClassVar[None] = None
    kind: Literal["characters"] = "characters"
    length: int = Field(1014, ge=1)
    alphabet: str = Field(ALPHABET, min_length=1)

    @model_validator(mode="after")
    def _check(self) -> CharacterInput:
        if not self.alphabet.isascii() or len(set(self.alphabet)) < len(self.alphabet) or "\0" in self.alphabet:
            raise ValueError("an alphabet is of different ASCII characters")
        return self

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return len(self.alphabet) + 2

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one text."""
        return (self.length,)

    @property
    def tensors(self) -> tuple[InputTensor, ...]:
        """The tensors that the network takes."""
        return (InputTensor("characters", "int64", (self.length,), below=self.vocabulary),)

    def summary(self) -> str:
        """The input in a few words."""
        return f"{self.length} characters of {self.vocabulary}"

    def override(self, normalise: str | None, input_shape: tuple[int, ...] | None, source: str) -> CharacterInput:
        """The input with the user's `--input-shape` applied. See `InputSpec.override`."""
        length = _overridden_length(self, None, normalise, input_shape, source)
        return self if length is None else self.model_copy(update={"length": length})


class TranslationInput(_Input):
    """An image and the domains to translate it to; the network returns images like those it takes.

    Attributes:
        images: see `InputSpec`.
        domains: how many; the second tensor (N, domains) is 1 for each wanted one, else 0.
    """

    noun: ClassVar[Noun] = "image"
    task: ClassVar[TaskName] = "translation"
    kind: Literal["translation"] = "translation"
    images: InputSpec
    domains: int = Field(ge=1, le=MOST_DOMAINS)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image."""
        return self.images.shape

    @property
    def tensors(self) -> tuple[InputTensor, ...]:
        """The tensors that the network takes."""
        return (*self.images.tensors, InputTensor("domains", "float32", (self.domains,)))

    def summary(self) -> str:
        """The input in a few words."""
        return f"{self.images.summary()}, and the {self.domains} domains"

    def override(self, normalise: str | None, input_shape: tuple[int, ...] | None, source: str) -> TranslationInput:
        """The input with the user's `--normalise` and `--input-shape` applied. See `InputSpec.override`."""
        return self.model_copy(update={"images": self.images.override(normalise, input_shape, source)})


class TensorInput(_Input):
    """Tensors of any shape, unchanged: signals, volumes, tables, or several inputs by name.

    Attributes:
        tensors: what the network takes; a single one is forward's first argument, several are keyword arguments.
    """

    noun: ClassVar[Noun] = "sample"
    task: ClassVar[TaskName] = "classification"
    domains: ClassVar[int] = 0
    images: ClassVar[None] = None
    kind: Literal["tensors"] = "tensors"
    tensors: tuple[InputTensor, ...] = Field(min_length=1, max_length=MOST_TENSORS)

    @model_validator(mode="after")
    def _check(self) -> TensorInput:
        names = [each.name for each in self.tensors]
        if len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
            raise ValueError("tensors have different names, each one of a parameter of forward")
        sizes = [size for each in self.tensors for size in each.shape]
        if any(isinstance(size, Free) or size < 1 for size in sizes):
            raise ValueError("every size of a tensor is fixed, and at least 1")
        if any(math.prod(_fixed(each)) > MOST_VALUES for each in self.tensors):
            raise ValueError(f"a tensor has at most {MOST_VALUES:,} values")
        return self

    @classmethod
    def of(cls, shape: tuple[int, ...], name: str = "inputs") -> TensorInput:
        """The input of a network that takes one float32 tensor.

        Args:
            shape: of one sample, without the batch.
            name: of the input in an exported file.
        """
        return cls(tensors=(InputTensor(name, "float32", shape),))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample of the first tensor."""
        return _fixed(self.tensors[0])

    def summary(self) -> str:
        """The input in a few words."""
        shapes = (" × ".join(map(str, each.shape)) or "a number" for each in self.tensors)
        return ", ".join(f"{each.dtype} {each.name} ({of})" for each, of in zip(self.tensors, shapes, strict=True))

    def override(self, normalise: str | None, input_shape: tuple[int, ...] | None, source: str) -> TensorInput:
        """The input with the user's `--input-shape` applied. See `InputSpec.override`."""
        if normalise is not None:
            raise SettingsError(f"{source}: takes {self.summary()}, which is not normalized. Leave --normalise out.")
        if input_shape is None:
            return self
        first = self.tensors[0]
        if len(self.tensors) > 1 or len(input_shape) != len(first.shape) or min(input_shape) < 1:
            raise SettingsError(
                f"{source}: takes {self.summary()}, and --input-shape {','.join(map(str, input_shape))} is not of "
                + ("one tensor of several. Leave it out." if len(self.tensors) > 1 else "a tensor like this.")
            )
        return TensorInput(tensors=(replace(first, shape=input_shape),))


def _fixed(tensor: InputTensor) -> tuple[int, ...]:
    return tuple(size for size in tensor.shape if isinstance(size, int))


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("kind", "image"))
    return str(getattr(value, "kind", None))  # not an input: no known kind


# What a network can take. Another kind is a class with `kind`, `noun`, `task` (what the network's output means, if
# nothing else says so: a row of `litdeploy.tasks.TASKS`), `domains`, `shape`, `images`, `tensors`, `metadata`,
# `summary`, `within` and `override`, and its place here; `Network.example` makes noise of its tensors.
AnyInput = Annotated[
    Annotated[InputSpec, Tag("image")]
    | Annotated[TokenInput, Tag("tokens")]
    | Annotated[CharacterInput, Tag("characters")]
    | Annotated[TranslationInput, Tag("translation")]
    | Annotated[TensorInput, Tag("tensors")],
    Discriminator(_kind),
]
_ANY_INPUT: TypeAdapter[AnyInput] = TypeAdapter(AnyInput)
INPUTS = (InputSpec, TokenInput, CharacterInput, TranslationInput, TensorInput)


def input_of(metadata: Mapping[str, str]) -> AnyInput | None:
    """The input that the metadata of an exported file describe; None if they do not."""
    stated = metadata.get("input")
    if stated is None and {"input_shape", "mean", "std"} <= metadata.keys():
        stated = f'{{"shape": {metadata["input_shape"]}, "mean": {metadata["mean"]}, "std": {metadata["std"]}}}'
    try:
        return None if stated is None else _ANY_INPUT.validate_json(stated)
    except ValidationError:
        return None


# section → indices of the teacher's blocks that are kept, in order; an unnamed section is kept whole.
DepthPlan = dict[str, tuple[int, ...]]


class NetworkSpec(Settings):
    """A network without its weights.

    Attributes:
        name: in the registry: `resnet`, `resnext`, `timm:NAME`, `hf:NAME`, `package.module:function`.
        arguments: keyword arguments of the builder; with a plan, those of the *teacher*.
        input: what it takes.
        classes: names of the classes, in the order of the logits; empty if they are not known.
        plan: for a student, the blocks it keeps of its teacher.
        widths: layer → shape of its weight, for layers with channels removed.
        task: what its output means; None: the input's own task, as in files that are older than this field.
    """

    name: str
    arguments: dict[str, int | float | str | bool] = Field(default_factory=dict)
    input: AnyInput
    classes: tuple[str, ...] = ()
    plan: DepthPlan | None = None
    widths: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    task: TaskName | None = None

    @property
    def task_name(self) -> TaskName:
        """What its output means."""
        return self.task or self.input.task

    def metadata(self) -> dict[str, str]:
        """The spec's entries in the metadata of an exported file; `input_of` reads the input."""
        own = {} if self.task is None else {"task": self.task}
        return {**self.input.metadata(), "classes": json.dumps(self.classes), **own}

    def with_(self, **changes: Any) -> NetworkSpec:
        """The same with some fields changed."""
        return self.model_copy(update=changes)


def parse_normalisation(text: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Parse `imagenet` or `m1,m2,m3:s1,s2,s3`.

    Named statistics of three channels are averaged for a network of one channel.

    Raises:
        SettingsError: an unknown name, or not one number for each channel on each side.
    """
    if text in NORMALISATIONS:
        mean, std = NORMALISATIONS[text]
        if channels == len(mean):
            return mean, std
        if channels == 1:
            return (math.fsum(mean) / len(mean),), (math.fsum(std) / len(std),)
        raise SettingsError(
            f"--normalise {text} has {len(mean)} channels and the network takes {channels}. Give the numbers: "
            f"--normalise m1,…,m{channels}:s1,…,s{channels}."
        )
    try:
        mean, std = (tuple(float(number) for number in part.split(",")) for part in text.split(":"))
    except ValueError:
        raise SettingsError(
            f"--normalise {text}: neither a known name ({', '.join(NORMALISATIONS)}) nor means and standard deviations "
            "on the scale 0–1, as in 0.49,0.48,0.45:0.25,0.24,0.26."
        ) from None
    if not len(mean) == len(std) == channels or min(std) <= 0 or not all(map(math.isfinite, (*mean, *std))):
        raise SettingsError(
            f"--normalise {text}: needs {channels} means and {channels} standard deviations above 0, one a channel."
        )
    return mean, std


def image_shape(input_shape: tuple[int, ...], source: str) -> tuple[int, int, int]:
    """An image's (channels, height, width).

    Raises:
        SettingsError: the shape has another number of sizes.
    """
    if len(input_shape) != 3:
        raise SettingsError(
            f"{source}: takes images, and --input-shape {','.join(map(str, input_shape))} is not of one. Give "
            "channels, height and width: --input-shape 3,32,32."
        )
    channels, height, width = input_shape
    return channels, height, width


def _overridden_length(
    spec: TokenInput | CharacterInput,
    most: int | None,
    normalise: str | None,
    input_shape: tuple[int, ...] | None,
    source: str,
) -> int | None:
    """The length of texts that `--input-shape` asks for; None if it is not given."""
    if normalise is not None:
        raise SettingsError(f"{source}: takes {spec.kind}, which are not normalized. Leave --normalise out.")
    if input_shape is None:
        return None
    if len(input_shape) != 1 or not 1 <= input_shape[0] <= (most or input_shape[0]):
        raise SettingsError(
            f"{source}: takes texts of {f'up to {most} ' if most else ''}{spec.kind}, and --input-shape "
            f"{','.join(map(str, input_shape))} is no such length. Give one number: --input-shape "
            f"{min(128, spec.length)}."
        )
    return input_shape[0]
