"""The feature cache: the teacher's features for K augmented views of each training image, computed once.

The teacher is frozen, so its features of a given view never change. The first K passes over the data run the teacher
and keep its features; later passes, and further students of the same teacher and data, read them.

Shape suffixes: K views, M images of the split, N images of a batch.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from litdeploy.batch import Batch
from litdeploy.config.spec import Noun
from litdeploy.data import Crops, Picked, Split, free_memory, shuffled
from litdeploy.errors import TrainingError
from litdeploy.files import parse_json, read_small, write_whole
from litdeploy.networks.sections import BlockArguments, SectionCall
from litdeploy.trainer.methods import TrainingPhase
from litdeploy.trainer.teacher import Features

# Views that `auto` keeps, and how many epochs must at least use each.
AUTO_VIEWS = 4
_AUTO_VISITS = 2

# Version of the files' layout; others are not read.
_SCHEMA = 2
_KEY = "key.json"
# The tensor that is created last: once its file exists, all of them do.
LAST = "filled"


@dataclass(frozen=True)
class Layout:
    """Tensors that are kept of one view of one image.

    Attributes:
        shapes: name → shape without the batch, in bfloat16: `layer2.output`, and `layer2.input` if that is not
            another section's output.
        inputs: section → the name that its input is kept under, for sections whose input is needed.
        output: tensor of the teacher's answer → shape without the batch, in float32; `logits` if it is one tensor.
        recomputed: whether blocks take further tensors, such as an attention mask. They are not kept, but computed
            again for each batch: see `Teacher.arguments`.
    """

    shapes: dict[str, tuple[int, ...]]
    inputs: dict[str, str]
    output: dict[str, tuple[int, ...]]
    recomputed: bool = False

    @classmethod
    def of(
        cls, features: Features, inputs: Collection[str], outputs: Collection[str], recomputed: bool = False
    ) -> Layout | None:
        """The layout for features like these; None if a section whose input is needed takes further tensors, such as an
        attention mask, that cannot be recomputed.

        Args:
            inputs, outputs: sections whose input or output is needed.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        kept: dict[str, str] = {}
        given: dict[int, str] = {}
        for name, call in features.calls.items():
            others = (value for args, kwargs in call.arguments for value in (*args, *kwargs.values()))
            if name in inputs and not recomputed and any(isinstance(value, Tensor) for value in others):
                return None
            if name in inputs:
                kept[name] = given.get(id(call.input), f"{name}.input")
                shapes.setdefault(kept[name], tuple(call.input.shape[1:]))
            if name in outputs:
                given[id(call.output)] = f"{name}.output"
                shapes[f"{name}.output"] = tuple(call.output.shape[1:])
        answer = {name: tuple(tensor.shape[1:]) for name, tensor in _named(features.output).items()}
        return cls(shapes, kept, answer, recomputed)

    def bytes(self, views: int, images: int) -> int:
        """Size of a cache of this many views of this many images."""
        values = sum(math.prod(shape) for shape in self.shapes.values())
        answer = sum(math.prod(shape) for shape in self.output.values())
        # Besides values and answer: how the view was cropped (two offsets, a flip), and whether the slot is filled.
        return views * images * (2 * values + 4 * answer + 6)


@dataclass(frozen=True)
class CachePlan:
    """Whether and where features are cached.

    Attributes:
        views: of each image; 0: nothing is cached.
        mapped: in a memory-mapped file, not in the device's memory.
        why: the message for the user.
    """

    views: int
    mapped: bool
    why: str


def plan_cache(
    setting: int | Literal["auto", "off"],
    layout: Layout | None,
    images: int,
    epochs: int,
    device: torch.device,
    folder: Path,
    keep: bool,
    ranks: int = 1,
    auto_views: int = AUTO_VIEWS,
    noun: Noun = "image",
) -> CachePlan:
    """Decide on the feature cache.

    Args:
        setting: number of views, or `auto`: if caching pays and there is room.
        layout: None if the features cannot be cached.
        images: number of training images.
        epochs: those in which the teacher is needed.
        folder: of a memory-mapped file.
        keep: whether the user wants the files, for further students.
        ranks: that train; several cache nothing, and `check_recipe` refuses an explicit request.
        auto_views: views that `auto` keeps; one if all are the same.
        noun: what messages call an image.

    Raises:
        TrainingError: the user gave a number of views, and they cannot be cached or there is no room for them.
    """
    if setting == "off":
        return CachePlan(0, False, "feature cache: off")
    if ranks > 1:
        return CachePlan(0, False, f"feature cache: none; it is not kept by several ranks, and there are {ranks}")
    if layout is None:
        why = "the teacher's features depend on more than the image (a domain, an attention mask), which is not kept"
        if setting == "auto":
            return CachePlan(0, False, f"feature cache: none; {why}")
        raise TrainingError(f"--feature-cache {setting}: {why}. Train without: --feature-cache off")
    views = auto_views if setting == "auto" else setting
    size = layout.bytes(views, images)
    what = f"{views} view{'s' * (views > 1)} of {images:,} {noun}s, {size / 1e9:.2g} GB"
    if setting == "auto" and not keep and epochs < _AUTO_VISITS * views:
        return CachePlan(0, False, f"feature cache: none; {what} would be seen less than twice in {epochs} epochs")
    does = f"the teacher runs in {min(views, epochs)} of {epochs} epochs"
    # Half of what is free: the other half is for the training itself.
    memory, disk = free_memory(device) // 2, _free_on_disk(folder) // 2
    if size <= memory and not keep:
        return CachePlan(views, False, f"feature cache: {what} in memory; {does}")
    # Reading features from a disk may be slower than computing them. `auto` chooses a file only if the system's file
    # cache can hold all of it, and on a CPU, where the teacher is slower.
    swift = device.type == "cpu" and size <= 2 * memory
    if size <= disk and (keep or setting != "auto" or swift):
        return CachePlan(views, True, f"feature cache: {what} in {folder}; {does}")
    room = f"{memory / 1e9:.2g} GB of memory and {disk / 1e9:.2g} GB of disk may be used for it"
    if setting == "auto":
        return CachePlan(0, False, f"feature cache: none; {what} do not fit, {room}")
    raise TrainingError(
        f"--feature-cache {setting}: {what} do not fit; {room}. Keep fewer views, or none: --feature-cache off"
    )


def _free_on_disk(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@dataclass(frozen=True)
class Views:
    """The views of a batch.

    Attributes:
        crops: of each image, on the CPU.
        slots_N: int64, on the CPU: slots of its features. In a batch that is not known, images whose features are kept
            already are written to a slot that is never read.
        known: whether the features of all images are kept.
    """

    crops: Crops
    slots_N: Tensor
    known: bool


class FeatureCache:
    """Features of `views` augmented views of each image: the views of the first passes over the data.

    Args:
        template: the teacher's features of any batch; supplies the sections' further arguments.
        layout: of the template.
        views: K.
        images: M, of the training split.
        padding: of the augmentation.
        device: of the features read, and of their storage without a folder.
        folder: of memory-mapped files, for further students; None: keep features in memory.
        key: what the features were computed from; files are reused only under the same key.

    Attributes:
        passes: number of passes over the data that were begun.
        began_empty: whether nothing was cached when the run began.

    Raises:
        TrainingError: the folder's features were computed from something else, or are damaged.
    """

    def __init__(
        self,
        template: Features,
        layout: Layout,
        views: int,
        images: int,
        padding: int,
        device: torch.device,
        folder: Path | None = None,
        key: Mapping[str, Any] | None = None,
    ) -> None:
        self.layout = layout
        self.views = views
        self._images = images
        self._padding = padding
        self._device = device
        self._dtype = next(iter(template.calls.values())).output.dtype if template.calls else torch.float32
        self._arguments = {name: call.arguments for name, call in template.calls.items()}
        self.passes = 0
        self._files: CacheFiles | None = None
        if folder is not None:
            what = {"views": views, "images": images, "shapes": layout.shapes, **(key or {})}
            self._files = CacheFiles(folder, what)
        slots = views * images
        self._several = isinstance(template.output, dict)
        self._values = {
            name: self._tensor(name, (slots + 1, *_stored_shape(shape)), torch.bfloat16, device)
            for name, shape in layout.shapes.items()
        }
        # By their places: the names are the user's.
        self._answer = {
            name: self._tensor(
                f"output{place}" if self._several else "logits", (slots + 1, *shape), torch.float32, device
            )
            for place, (name, shape) in enumerate(layout.output.items())
        }
        self._answer_types = {name: tensor.dtype for name, tensor in _named(template.output).items()}
        # A few bytes, which the host reads when it plans a batch: always in its memory.
        host = torch.device("cpu")
        self._cuts = self._tensor("cuts", (3, slots), torch.int16, host)
        self._filled = self._tensor(LAST, (views, images), torch.uint8, host)
        self.began_empty = not self._filled.any()

    def emptied(self) -> FeatureCache | None:
        """Empty the cache for another teacher; None if it is in files, which stay for further students of the first
        teacher and for resuming from before the change."""
        if self.mapped:
            return None
        self._filled.zero_()
        self.passes = 0
        return self

    def begin_pass(self) -> None:
        """Begin the next pass over the data."""
        self.passes += 1

    def choose(self, indices_N: Tensor, fresh: Crops) -> Views:
        """Choose the views of a batch: kept ones, each in its turn, or fresh ones while there is room.

        Args:
            indices_N: indices of the images in the training split, on the CPU.
            fresh: on the CPU; used for images whose view of this turn is not kept yet.
        """
        turn = (self.passes - 1) % self.views
        filled_KN = self._filled[:, indices_N].bool()
        # The turn's view if it is kept; else a new one in the first passes, and any kept one later.
        other_N = filled_KN.int().argmax(0)
        late = self.passes > self.views
        view_N = torch.where(filled_KN[turn] | (not late) | ~filled_KN.any(0), turn, other_N)
        slots_N = view_N * self._images + indices_N
        known_N = filled_KN.gather(0, view_N[None])[0]
        tops_N, lefts_N, flips_N = self._cuts[:, slots_N].long()
        crops = Crops(
            torch.where(known_N, tops_N, fresh.tops_N),
            torch.where(known_N, lefts_N, fresh.lefts_N),
            torch.where(known_N, flips_N.bool(), fresh.flips_N),
            self._padding,
        )
        known = bool(known_N.all())
        return Views(crops, slots_N if known else slots_N.masked_fill(known_N, self._nowhere), known)

    def write(self, slots_N: Tensor, features: Features) -> None:
        """Store the features of a batch; `mark` then declares them valid."""
        slots_N = slots_N.to(self._storage)
        for name, tensor in _named(features.output).items():
            self._answer[name].index_copy_(0, slots_N, tensor.to(self._storage, torch.float32))
        for name, call in features.calls.items():
            for key, value in ((f"{name}.input", call.input), (f"{name}.output", call.output)):
                if key in self._values:
                    self._write(key, slots_N, value)

    def mark(self, views: Views) -> None:
        """Declare the features of these views valid. Called after `write`, so that a run stopped in between leaves no
        half-written slot marked."""
        crops = views.crops
        new_N = views.slots_N != self._nowhere
        slots_N = views.slots_N[new_N]
        self._cuts[:, slots_N] = torch.stack([crops.tops_N, crops.lefts_N, crops.flips_N.long()]).short()[:, new_N]
        self._filled.view(-1).index_fill_(0, slots_N, 1)

    def read(
        self, slots_N: Tensor, recompute: Callable[[], Mapping[str, Sequence[BlockArguments]]] | None = None
    ) -> Features:
        """Read the features of these slots, on the device, in the template's dtype. Tensors outside the layout are
        empty.

        Args:
            recompute: gives the blocks' further arguments for the batch; called if the layout says so.
        """
        slots_N = slots_N.to(self._storage)
        recomputed = recompute() if recompute is not None and self.layout.recomputed else self._arguments
        answer = {
            name: kept.index_select(0, slots_N).to(self._device, self._answer_types[name])
            for name, kept in self._answer.items()
        }
        read = {name: self._read(name, slots_N) for name in self.layout.shapes}
        nothing = torch.empty(0, device=self._device)
        return Features(
            answer if self._several else next(iter(answer.values())),
            {
                name: SectionCall(
                    read.get(self.layout.inputs.get(name, ""), nothing), arguments, read.get(f"{name}.output", nothing)
                )
                for name, arguments in recomputed.items()
            },
        )

    def marks(self) -> dict[str, Tensor]:
        """Which features are kept (`filled`), and of which views (`cuts`); read-only."""
        return {"cuts": self._cuts, "filled": self._filled}

    def restore(self, cuts: Tensor, filled: Tensor, began_empty: bool) -> bool:
        """Restore the marks of a checkpoint if the features still exist; otherwise empty the cache.

        Returns:
            Whether the features still exist.

        Raises:
            ValueError: these are not marks of this cache.
            TrainingError: the features are gone, and the run did not compute all of them itself.
        """
        if cuts.shape != self._cuts.shape or filled.shape != self._filled.shape:
            raise ValueError("the cached features are of other images")
        then_S = filled.view(-1).bool()
        there = self.mapped and bool(self._filled.view(-1)[then_S].all())
        there = there and torch.equal(self._cuts[:, then_S], cuts[:, then_S])
        if not there and not began_empty:
            raise TrainingError(
                "the teacher's features that the run began with are no longer in --feature-cache-dir, so it cannot be "
                "resumed. Give the same folder as before, or start over: --overwrite"
            )
        self._cuts.copy_(cuts)
        self._filled.copy_(filled if there else torch.zeros_like(filled))
        self.began_empty = began_empty
        return there

    def flush(self) -> None:
        """Write cached files to the disk, so that no mark in a checkpoint outlives its features."""
        if self._files is not None:
            self._files.flush()

    @property
    def mapped(self) -> bool:
        """Whether the features are in files."""
        return self._files is not None

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._files is None:
            return torch.zeros(shape, dtype=dtype, device=device)
        return self._files.tensor(name, shape, dtype)

    @property
    def _storage(self) -> torch.device:
        """Where the features are."""
        return next(iter(self._answer.values())).device

    @property
    def _nowhere(self) -> int:
        """The slot behind the last one, which is never read."""
        return self.views * self._images

    def _write(self, name: str, slots_N: Tensor, value: Tensor) -> None:
        kept = self._values[name]
        kept.index_copy_(0, slots_N, _channels_last(value).to(kept.device, kept.dtype))

    def _read(self, name: str, slots_N: Tensor) -> Tensor:
        value = self._values[name].index_select(0, slots_N).to(self._device, self._dtype)
        return value.permute(0, 3, 1, 2) if value.dim() == 4 else value


def passes_until(
    phases: Sequence[TrainingPhase], phase: int, epoch: int, step: int
) -> Iterator[tuple[bool, int | None]]:
    """The passes of a run up to a step: for each, whether it used the present cache, and its steps; None: all.

    Features of earlier teachers are not kept; their passes only drew from the generators.
    """
    begun = phases[: phase + 1]
    first = max(
        (number for number, each in enumerate(begun) if each.transition and each.transition.new_teacher), default=0
    )
    for number, each in enumerate(begun):
        taught = each.objective.needs_teacher and number >= first
        for _ in range(epoch if number == phase else each.settings.epochs):
            yield taught, None
        if number == phase:
            yield taught, step


@torch.no_grad()
def refill(
    cache: FeatureCache,
    split: Split,
    batch_size: int,
    seed: int,
    passes: Iterable[tuple[bool, int | None]],
    draw: Callable[[torch.Generator], Crops],
    features: Callable[[Picked, Crops], Features],
) -> None:
    """Fill an empty cache as an earlier run had filled it, with the teacher alone.

    In the same batches: a teacher's results for an image may differ in their last bits between two batches.

    Args:
        split, batch_size, seed: of the run.
        passes: of the run; see `passes_until`.
        draw: generator → crops of a batch.
        features: of a batch with these crops.
    """
    order, draws = (torch.Generator().manual_seed(seed) for _ in range(2))
    for cached, steps in passes:
        if cached:
            cache.begin_pass()
        new = []
        for indices_N in shuffled(len(split), batch_size, order)[:steps]:
            fresh = draw(draws)
            # No image is in two batches of a pass: none of them changes the views of the others.
            views = cache.choose(indices_N, fresh) if cached else None
            if views is not None and not views.known:
                new.append((indices_N, views))
        for (_, views), picked in zip(new, split.pick([indices_N for indices_N, _ in new]), strict=True):
            cache.write(views.slots_N.to(picked.labels_N.device), features(picked, views.crops))
            cache.mark(views)


def _stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Feature maps are stored as (height, width, channels), so that they are read in channels-last memory format."""
    return (shape[1], shape[2], shape[0]) if len(shape) == 3 else shape


def _named(output: Batch) -> dict[str, Tensor]:
    return output if isinstance(output, dict) else {"logits": output}


def _channels_last(value: Tensor) -> Tensor:
    return value.permute(0, 2, 3, 1) if value.dim() == 4 else value


class CacheFiles:
    """Memory-mapped tensors in a folder, shared with other runs under the same key.

    Args:
        folder: created if missing.
        key: what the tensors are computed from.

    Raises:
        TrainingError: the folder holds something else, or its key cannot be read.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        _claim(folder, key)
        self._folder = folder
        self._names: list[str] = []

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor of that name, on the CPU: with its earlier content, or zeros.

        Raises:
            TrainingError: its file has another size, or cannot be created.
        """
        path, size = self._file(name), math.prod(shape)
        if path.is_symlink():  # writes would go to another file
            raise TrainingError(f"{path}: is a link. Delete it, or give --feature-cache-dir another folder.")
        found = path.stat().st_size if path.is_file() else 0
        begun = self._file(LAST).is_file()
        if found != size * dtype.itemsize and (found or begun):
            raise TrainingError(
                f"{path}: has {found:,} bytes instead of {size * dtype.itemsize:,}. Delete {self._folder}, or give "
                "--feature-cache-dir another folder."
            )
        _reserve(path, size * dtype.itemsize)
        self._names.append(name)
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    def flush(self) -> None:
        """Write all tensors to the disk, in the order in which they were created."""
        for name in self._names:
            with self._file(name).open("rb+") as file:
                os.fsync(file.fileno())

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.bin"


def _reserve(path: Path, size: int) -> None:
    """Reserve the file's space, as zeros: a write to a mapped page without space on the disk kills the process.

    Raises:
        TrainingError: there is no space, or the file cannot be written.
    """
    try:
        with path.open("rb+" if path.is_file() else "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:  # the file system cannot reserve space; the C library may emulate it
            return
        raise TrainingError(
            f"{path}: the teacher's features cannot be written there ({error.strerror}). Make room, give "
            "--feature-cache-dir another folder, or train without: --feature-cache off"
        ) from None


def _claim(folder: Path, key: Mapping[str, Any]) -> None:
    """Claim the folder for this key, or check that it is claimed already.

    Raises:
        TrainingError: the folder has another key, or its key cannot be read.
    """
    wanted = json.loads(json.dumps({"schema": _SCHEMA, **key}))
    path = folder / _KEY
    if path.is_file():
        try:
            found = parse_json(read_small(path))
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise TrainingError(f"{path}: is damaged. Delete {folder}, or give --feature-cache-dir another folder.")
        if found != wanted:
            other = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            raise TrainingError(
                f"{folder}: holds the feature cache of another run ({', '.join(other)} differ). Give "
                "--feature-cache-dir another folder, or delete this one."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise TrainingError(f"{folder}: is no feature cache, and not empty. Give --feature-cache-dir another folder.")
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
