"""One pass over the training images: from where a batch lies to the student's update.

Shape suffixes: N images of a batch, M images of the source, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from litdeploy.batch import Batch
from litdeploy.config.recipe import Augmentation, Recipe
from litdeploy.config.spec import AnyInput
from litdeploy.data import Crops, Split, draw_crops, prepared, shuffled
from litdeploy.tasks import task_of
from litdeploy.trainer import kernels
from litdeploy.trainer.cache import FeatureCache, Views
from litdeploy.trainer.graph import Captured
from litdeploy.trainer.parallel import ALONE, Ranks
from litdeploy.trainer.step import Step
from litdeploy.trainer.teacher import DTYPES, Features, Teacher


class Epochs:
    """The passes of one phase.

    Attributes:
        teacher: None where the phase needs none.
        before: state of `order`, and passes of the cache, before the pass under way; None between two passes.
        stepping: whether a step is under way: then weights and statistics may be half changed.

    Args:
        teacher: see above.
        cache: features that were kept, or are to be; None: the teacher runs for each batch.
        optimiser: of the student.
        recipe: its batch size and augmentation.
        order, draws: generators of the order and of the crops, on the CPU.
        capture: replay each step as a CUDA graph.
        ranks: that share each batch. All draw the whole of it, and each takes its part.
    """

    def __init__(
        self,
        step: Step,
        teacher: Teacher | None,
        cache: FeatureCache | None,
        optimiser: torch.optim.Optimizer,
        spec: AnyInput,
        recipe: Recipe,
        order: torch.Generator,
        draws: torch.Generator,
        capture: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self.step = step
        self.teacher = teacher
        self._cache = cache
        self._optimiser = optimiser
        self._input = spec
        self._recipe = recipe
        # Texts are seen as they are.
        self._augmentation = recipe.augmentation if spec.images else Augmentation(padding=0, flip=False)
        self._order = order
        self._draws = draws
        self.before: tuple[Tensor, int] | None = None
        self.stepping = False
        wrap: Callable[[Any], Any] = Captured if capture else _as_is
        self._on_new, self._on_known = (wrap(partial(self._update, known)) for known in (False, True))

    def run(self, split: Split, done: int = 0) -> Iterator[dict[str, Tensor]]:
        """Trains on each batch of one pass. Gives its losses, on the device; the next step may overwrite them.

        Args:
            done: steps of this pass that were done before, by a run that is gone on with: they are left out.
        """
        self.before = (self._order.get_state(), 0 if self._cache is None else self._cache.passes)
        if self._cache is not None:
            self._cache.begin_pass()
        batches = shuffled(len(split), self._recipe.batch_size, self._order)[done:]
        batches = tuple(self._ranks.part(indices) for indices in batches)
        for indices_N, picked in zip(batches, split.pick(batches), strict=True):
            fresh = self._part(draw_crops(self._recipe.batch_size, self._augmentation, self._draws))
            device = picked.labels_N.device
            views = None if self._cache is None else self._cache.choose(indices_N, fresh)
            crops = (fresh if views is None else views.crops).to(device)
            slots_N = indices_N if views is None else views.slots_N.to(device)
            tensors = (picked.source_MCHW, picked.rows_N, picked.labels_N, crops.tops_N, crops.lefts_N, crops.flips_N)
            known = views is not None and views.known
            self.stepping = True
            losses = (self._on_known if known else self._on_new)(*tensors, slots_N)
            if views is not None and not known:
                self._mark(views)
            self.stepping = False
            yield losses

    def settle(self) -> None:
        """The pass is over, with all that belongs to it."""
        self.before = None

    @torch.no_grad()
    def refill(self, split: Split, taught: bool, steps: int | None) -> None:
        """One pass again that only keeps the teacher's features, as `run` had kept them.

        Args:
            taught: whether the pass used the cache; else it only drew its crops.
            steps: of the pass; None: all.
        """
        assert self._cache is not None
        if taught:
            self._cache.begin_pass()
        new = []
        for indices_N in shuffled(len(split), self._recipe.batch_size, self._order)[:steps]:
            fresh = draw_crops(self._recipe.batch_size, self._augmentation, self._draws)
            # No image is in two batches of a pass: none of them changes what is known of the others.
            views = self._cache.choose(indices_N, fresh) if taught else None
            if views is not None and not views.known:
                new.append((indices_N, views))
        for (_, views), picked in zip(new, split.pick([indices_N for indices_N, _ in new]), strict=True):
            device = picked.labels_N.device
            crops = views.crops.to(device)
            cut = (crops.tops_N, crops.lefts_N, crops.flips_N)
            inputs = self._inputs(picked.source_MCHW, picked.rows_N, picked.labels_N, *cut)
            self._features(inputs, views.slots_N.to(device), known=False)
            self._mark(views)

    def samples(self, split: Split, batches: int) -> Iterator[Batch]:
        """What the student takes of the images of at most so many whole batches, augmented as a step sees them.

        The same at each call and on each rank: drawn by generators of their own, so that no step sees others for it.
        """
        order, draws = (torch.Generator().manual_seed(self._recipe.seed) for _ in range(2))
        picked = split.pick(shuffled(len(split), self._recipe.batch_size, order)[:batches])
        for each in picked:
            crops = draw_crops(self._recipe.batch_size, self._augmentation, draws).to(each.labels_N.device)
            yield self._inputs(each.source_MCHW, each.rows_N, each.labels_N, crops.tops_N, crops.lefts_N, crops.flips_N)

    def _part(self, crops: Crops) -> Crops:
        part = self._ranks.part
        return replace(crops, tops_N=part(crops.tops_N), lefts_N=part(crops.lefts_N), flips_N=part(crops.flips_N))

    def _mark(self, views: Views) -> None:
        assert self._cache is not None
        self._cache.mark(views)

    def _update(
        self,
        known: bool,
        source_MCHW: Tensor,
        rows_N: Tensor,
        labels_N: Tensor,
        tops_N: Tensor,
        lefts_N: Tensor,
        flips_N: Tensor,
        slots_N: Tensor,
    ) -> dict[str, Tensor]:
        """One step. `known`: the batch's features are kept already."""
        inputs = self._inputs(source_MCHW, rows_N, labels_N, tops_N, lefts_N, flips_N)
        features = self._features(inputs, slots_N, known)
        return self.step(self._optimiser, inputs, labels_N, features)

    def _features(self, inputs: Batch, slots_N: Tensor, known: bool) -> Features | None:
        if self._cache is not None and known:
            return self._cache.read(slots_N)
        features = None if self.teacher is None else self.teacher(inputs)
        if self._cache is not None and features is not None:
            self._cache.write(slots_N, features)
        return features

    def _inputs(
        self, source_MCHW: Tensor, rows_N: Tensor, labels_N: Tensor, tops_N: Tensor, lefts_N: Tensor, flips_N: Tensor
    ) -> Batch:
        """What the student takes; who translates is asked for the domains of other images."""
        image = self._input.images
        if image is None:
            return prepared(source_MCHW.index_select(0, rows_N), self._input)
        crops = Crops(tops_N, lefts_N, flips_N, self._augmentation.padding)
        dtype = DTYPES[self.step.precision]
        images_NCHW = kernels.augmented(source_MCHW, rows_N, crops, image, dtype)
        return task_of(self._input).training_inputs(images_NCHW, labels_N, self._input)


def _as_is(function: Any) -> Any:
    return function
