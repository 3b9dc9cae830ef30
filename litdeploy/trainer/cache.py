"""The feature cache: what the teacher makes of K augmented views of each training image, computed once.

The teacher is frozen: what it makes of an image's view never changes. The first K passes over the data run as ever and
keep what the teacher gave; later passes, and further students of the same teacher and data, read it.

Shape suffixes: K views, M images of the split, N images of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litdeploy.data import Crops
from litdeploy.networks.sections import SectionCall
from litdeploy.trainer.cache_files import LAST, CacheFiles
from litdeploy.trainer.teacher import Features


@dataclass(frozen=True)
class Layout:
    """What is kept of one view of one image, beside the logits.

    Attributes:
        shapes: name → shape without the batch, in bfloat16: `layer2.output`, and `layer2.input` where that is not
            another section's output.
        inputs: section → the name that its input is kept under, for those whose input is asked for.
        classes: of the logits, in float32.
    """

    shapes: dict[str, tuple[int, ...]]
    inputs: dict[str, str]
    classes: int

    @classmethod
    def of(cls, features: Features, inputs: Collection[str], outputs: Collection[str]) -> Layout | None:
        """The layout for features like these; None where a section whose input is asked for takes further tensors (an
        attention mask, say).

        Args:
            inputs, outputs: sections whose input or output is asked for.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        kept: dict[str, str] = {}
        given: dict[int, str] = {}
        for name, call in features.calls.items():
            args, kwargs = call.arguments
            if name in inputs and any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
                return None
            if name in inputs:
                kept[name] = given.get(id(call.input), f"{name}.input")
                shapes.setdefault(kept[name], tuple(call.input.shape[1:]))
            if name in outputs:
                given[id(call.output)] = f"{name}.output"
                shapes[f"{name}.output"] = tuple(call.output.shape[1:])
        return cls(shapes, kept, features.logits_NK.shape[1])

    def bytes(self, views: int, images: int) -> int:
        """Size of a cache of that many views of that many images."""
        values = sum(math.prod(shape) for shape in self.shapes.values())
        # Beside values and logits: where the view was cut (two offsets, a flip), and whether it is filled.
        return views * images * (2 * values + 4 * self.classes + 6)


@dataclass(frozen=True)
class Views:
    """The views that a batch is seen in.

    Attributes:
        crops: of each image, on the CPU.
        slots_N: int64, on the CPU: where its features are, or are to be kept. Of a batch that is not known, what is
            kept of an image already stays: it is sent to a slot that nobody reads.
        known: whether the features of all of them are there.
    """

    crops: Crops
    slots_N: Tensor
    known: bool


class FeatureCache:
    """Features of `views` augmented views of each image; the views are those of the first passes over the data.

    Args:
        template: the teacher's features of any batch; of it, the sections' further arguments.
        layout: of the template.
        views: K.
        images: M, of the training split.
        padding: of the augmentation.
        device: where features are given, and kept where there is no folder.
        folder: where they are kept, memory-mapped, for further students; None: in memory.
        key: what they were computed from; in a folder they are read again only under the same key.

    Attributes:
        passes: over the data that were begun.
        began_empty: whether nothing was kept when the run began.

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
        self._values = {
            name: self._tensor(name, (slots + 1, *_stored_shape(shape)), torch.bfloat16, device)
            for name, shape in layout.shapes.items()
        }
        self._logits = self._tensor("logits", (slots + 1, layout.classes), torch.float32, device)
        # Few bytes, and looked up by the host when it plans a batch: always in its memory.
        host = torch.device("cpu")
        self._cuts = self._tensor("cuts", (3, slots), torch.int16, host)
        self._filled = self._tensor(LAST, (views, images), torch.uint8, host)
        self.began_empty = not self._filled.any()

    def emptied(self) -> FeatureCache | None:
        """Itself without what it kept, for another teacher; None of one in files: these are of one teacher, for further
        students, and for a run that goes on from before the change."""
        if self.mapped:
            return None
        self._filled.zero_()
        self.passes = 0
        return self

    def begin_pass(self) -> None:
        """The next pass over the data begins."""
        self.passes += 1

    def choose(self, indices_N: Tensor, fresh: Crops) -> Views:
        """The views that a batch is seen in: those kept, each in its turn, or fresh ones where room is left.

        Args:
            indices_N: of the images in the training split, on the CPU.
            fresh: on the CPU; used for images of which the turn's view is not kept yet.
        """
        turn = (self.passes - 1) % self.views
        filled_KN = self._filled[:, indices_N].bool()
        # The turn's view where it is kept; in the first passes else a new one; later any that is.
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
        """Keeps what the teacher made of a batch; `mark` says then that it is there."""
        slots_N = slots_N.to(self._logits.device)
        self._logits.index_copy_(0, slots_N, features.logits_NK.to(self._logits.device))
        for name, call in features.calls.items():
            for key, value in ((f"{name}.input", call.input), (f"{name}.output", call.output)):
                if key in self._values:
                    self._write(key, slots_N, value)

    def mark(self, views: Views) -> None:
        """The features of these views are there. After `write`: a run stopped in between leaves no slot half kept."""
        crops = views.crops
        new_N = views.slots_N != self._nowhere
        slots_N = views.slots_N[new_N]
        self._cuts[:, slots_N] = torch.stack([crops.tops_N, crops.lefts_N, crops.flips_N.long()]).short()[:, new_N]
        self._filled.view(-1).index_fill_(0, slots_N, 1)

    def read(self, slots_N: Tensor) -> Features:
        """The features that are kept there, on the device, in the template's type. What nobody asked for is empty."""
        slots_N = slots_N.to(self._logits.device)
        read = {name: self._read(name, slots_N) for name in self.layout.shapes}
        nothing = torch.empty(0, device=self._device)
        return Features(
            self._logits.index_select(0, slots_N).to(self._device),
            {
                name: SectionCall(
                    read.get(self.layout.inputs.get(name, ""), nothing), arguments, read.get(f"{name}.output", nothing)
                )
                for name, arguments in self._arguments.items()
            },
        )

    def marks(self) -> dict[str, Tensor]:
        """Which features are kept (`filled`), and of which views (`cuts`); not to be written to."""
        return {"cuts": self._cuts, "filled": self._filled}

    def put_back(self, cuts: Tensor, filled: Tensor, began_empty: bool) -> bool:
        """Makes the marks what they were, where the features are still there; else nothing is kept any more.

        Returns:
            Whether the features are there.

        Raises:
            ValueError: these are not marks of this cache.
        """
        if cuts.shape != self._cuts.shape or filled.shape != self._filled.shape:
            raise ValueError("the kept features are of other images")
        then_S = filled.view(-1).bool()
        there = self.mapped and bool(self._filled.view(-1)[then_S].all())
        there = there and torch.equal(self._cuts[:, then_S], cuts[:, then_S])
        self._cuts.copy_(cuts)
        self._filled.copy_(filled if there else torch.zeros_like(filled))
        self.began_empty = began_empty
        return there

    def flush(self) -> None:
        """Brings what is kept in files to the disk: marks that outlive the machine must not tell of what does not."""
        if self._files is not None:
            self._files.flush()

    @property
    def mapped(self) -> bool:
        """Whether it is kept in files."""
        return self._files is not None

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._files is None:
            return torch.zeros(shape, dtype=dtype, device=device)
        return self._files.tensor(name, shape, dtype)

    @property
    def _nowhere(self) -> int:
        """The slot behind the last one."""
        return self.views * self._images

    def _write(self, name: str, slots_N: Tensor, value: Tensor) -> None:
        kept = self._values[name]
        kept.index_copy_(0, slots_N, _channels_last(value).to(kept.device, kept.dtype))

    def _read(self, name: str, slots_N: Tensor) -> Tensor:
        value = self._values[name].index_select(0, slots_N).to(self._device, self._dtype)
        return value.permute(0, 3, 1, 2) if value.dim() == 4 else value


def _stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Maps are kept as (height, width, channels): read again, they are in channels-last memory format."""
    return (shape[1], shape[2], shape[0]) if len(shape) == 3 else shape


def _channels_last(value: Tensor) -> Tensor:
    return value.permute(0, 2, 3, 1) if value.dim() == 4 else value
