"""The training loop.

    for each phase of the plan                        fit
        for each epoch
            for each batch                            train_epoch
                batch → teacher features → section losses → backward → update        _update
                losses → monitor, progress, checkpoint
            validate, log                             _end_epoch

Shape suffixes: N images of a batch, M images of the source, C channels, H height, W width.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from litdeploy.batch import Batch, mapped, moved
from litdeploy.config.recipe import Augmentation, Recipe
from litdeploy.config.spec import AnyInput
from litdeploy.data import Crops, Data, Picked, draw_crops, prepared, shuffled
from litdeploy.errors import TrainingError
from litdeploy.networks import Section
from litdeploy.networks.network import channels_last
from litdeploy.networks.width import narrow
from litdeploy.storage.records import CUT, Score
from litdeploy.tasks import task_of
from litdeploy.trainer import kernels
from litdeploy.trainer.batch_norm import ESTIMATION_BATCHES, average_statistics, estimate_statistics, synchronized
from litdeploy.trainer.distributed import ALONE, Ranks, divide
from litdeploy.trainer.feature_cache import FeatureCache, passes_until, refill
from litdeploy.trainer.interruption import Interruption, out_of_host_memory, out_of_memory, resumable, stoppable
from litdeploy.trainer.methods import TrainingPhase
from litdeploy.trainer.monitor import LossMonitor, no_longer_finite
from litdeploy.trainer.objectives import LitSections
from litdeploy.trainer.optimizer import new_optimizer, new_schedule, steps_per_epoch
from litdeploy.trainer.plan import Plan
from litdeploy.trainer.progress import Callback, MetricsLog, Row, Run
from litdeploy.trainer.resume import (
    Checkpoints,
    Position,
    Snapshot,
    cloned,
    differing_from,
    not_finite,
    of_this_student,
    optimizer_tensors,
    random_tensors,
    restore_optimizer,
    restore_random,
    restore_student,
)
from litdeploy.trainer.selection import Selection, unchanged
from litdeploy.trainer.step import Captured, Step, compiles_step, fallback, forward_flops, section_flops
from litdeploy.trainer.teacher import DTYPES, Features, Teacher
from litdeploy.trainer.validation import evaluate


class Trainer:
    """Train one student through the phases of its plan. A context manager: it holds the metrics file open.

    Args:
        plan: student, sections, phases and recipe.
        data: training, validation and test split.
        precision: `fp32` or `bf16`.
        folder: of the run's own files, besides its checkpoints.
        metrics: file of the metrics; the first rank writes it.
        progress: callbacks of the run.
        ranks: that share the run.
        checkpoints: what it can be resumed from.
        saved: the snapshot that it resumes; None: start.

    Attributes:
        teacher: the frozen teacher; None if no phase needs one.
        cache: of the teacher's features; None: compute them for each batch.
        reference: the unmodified teacher on `device`, if the task's metric compares with it; else None.
        spec: rebuilds the student in its present shape.
        selection: of the student to deliver.
        order, draws: generators of the images' order and of their crops, on the CPU.
        stepping: whether a step is in progress: weights and statistics may then be half changed.
    """

    def __init__(
        self,
        plan: Plan,
        data: Data,
        precision: str,
        device: torch.device,
        folder: Path,
        metrics: Path,
        progress: Callback,
        ranks: Ranks,
        checkpoints: Checkpoints,
        saved: Snapshot | None = None,
    ) -> None:
        self.student: nn.Module = channels_last(plan.student.module.to(device))
        self.spec = plan.student.spec.with_(classes=data.classes or plan.student.spec.classes)
        self.functions = plan.functions
        self.input: AnyInput = plan.student.spec.input
        self.example = moved(plan.student.example(), device)
        self.sections: Sequence[Section] = plan.sections
        self.phases = [phase for phase in plan.phases if phase.settings.epochs]
        self.recipe: Recipe = plan.recipe
        self.data = data
        self.precision = precision
        self.device = device
        self.folder = folder
        self.progress = progress
        self.ranks = ranks
        self.checkpoints = checkpoints
        self.saved = saved
        self.position = Position() if saved is None else saved.position()
        self.selection = Selection(task_of(self.spec), self.recipe, self.phases, self.position)
        self.teacher: Teacher | None = None
        self.cache: FeatureCache | None = None
        self.reference: nn.Module | None = None
        self.interruption = Interruption()
        self.order, self.draws = (torch.Generator().manual_seed(self.recipe.seed) for _ in range(2))
        self.stepping = False
        # Texts are not augmented.
        self._augmentation = self.recipe.augmentation if self.input.images else Augmentation(padding=0, flip=False)
        # The generator of the order and the passes of the cache before the present epoch; None between two epochs.
        self._before_epoch: tuple[Tensor, int] | None = None
        self._started = time.perf_counter()
        progress.noun = data.noun
        self._log = MetricsLog(metrics if ranks.first else Path(os.devnull), self.position.rows)

    def __enter__(self) -> Self:
        self.progress.on_fit_start(Run(self.folder, self.recipe, tuple(self.position.rows)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()
        if error is None:
            self.progress.on_fit_end()
        else:
            self.progress.on_exception(error)

    # The loop.

    def fit(self) -> None:
        """Train the student through all phases, from the run's position.

        All ranks have the same student when a phase begins; at the end the first one has it whole.

        Raises:
            TrainingError: a loss is not finite or diverges, memory runs out, or a rank is lost.
            DataError: an image cannot be decoded, or a worker process died.
            BundleError: a checkpoint cannot be written.
            KeyboardInterrupt: the user stopped the run; a checkpoint is written.
        """
        with self.interruption.held(), torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            # Layers that draw by themselves, such as dropout, draw differently on each rank.
            torch.manual_seed(self.recipe.seed + self.ranks.rank)
            if self.saved is not None:
                self._rebuild(self.saved)
            for number, phase in enumerate(self.phases):
                if number > self.position.phase:
                    self.position.enter(number)
                if number < self.position.phase or self.position.epoch == phase.settings.epochs:
                    continue
                with self.begun(phase):
                    while self.position.epoch < phase.settings.epochs:
                        with self._stoppable():
                            if self.selection.cut_is_next:
                                self._measure_cut()
                            self.train_epoch()
                            self._end_epoch()
                        if self.interruption.lacking:
                            raise self._out_of_memory()
            if self.saved is not None:
                self._restore(self.saved, in_phase=False)
            self.position.validation = self.ranks.on_first(self.selection.deliver, self.student, self.note)

    def train_epoch(self) -> None:
        """Train on each batch once, or on the rest of an epoch that was interrupted."""
        position, recipe, split = self.position, self.recipe, self.data.train
        alone, interruption, size = self.ranks.size == 1, self.interruption, recipe.batch_size
        cache = self.cache if self.taught else None
        done, epoch = position.step * size, position.epochs_done + 1
        self.progress.on_train_epoch_start(self.phase.name, epoch, self.epochs, len(split), done)
        clock = time.perf_counter() - position.seconds
        self._before_epoch = (self.order.get_state(), 0 if cache is None else cache.passes)
        if cache is not None:
            cache.begin_pass()
        batches = [self.sharing.part(each) for each in shuffled(len(split), size, self.order)[position.step :]]
        for indices_N, picked in zip(batches, split.pick(batches), strict=True):
            fresh = draw_crops(size, self._augmentation, self.draws).mapped(self.sharing.part)  # all ranks draw all
            device = picked.labels_N.device
            views = None if cache is None else cache.choose(indices_N, fresh)
            crops = (fresh if views is None else views.crops).to(device)
            slots_N = indices_N if views is None else views.slots_N.to(device)
            cut = (crops.tops_N, crops.lefts_N, crops.flips_N)
            update = self._update_cached if views is not None and views.known else self._update_new
            self.stepping = True
            losses = update(picked.source_MCHW, picked.rows_N, picked.labels_N, *cut, slots_N)
            if cache is not None and views is not None and not views.known:
                cache.mark(views)
            self.stepping = False
            self.schedule.step()
            self.monitor.add(losses)
            position.count_step(size)
            self.progress.on_train_batch_end(size, losses)
            if self.monitor.full or (alone and (interruption.asked or self._due())):
                stop, write = self.monitor.look(interruption.asked, self._due())
                position.seconds = time.perf_counter() - clock
                if stop:
                    raise KeyboardInterrupt  # `_stoppable` writes a checkpoint
                if write:
                    self.checkpoint()
        (stop,) = self.monitor.look(interruption.asked)
        position.seconds = time.perf_counter() - clock
        if stop:
            raise KeyboardInterrupt

    def _update(
        self,
        known: bool,
        source_MCHW: Batch,
        rows_N: Tensor,
        labels_N: Tensor,
        tops_N: Tensor,
        lefts_N: Tensor,
        flips_N: Tensor,
        slots_N: Tensor,
    ) -> dict[str, Tensor]:
        """One update: batch → teacher features → section losses → backward → optimizer. Captured as one CUDA graph.

        Args:
            known: whether the batch's features are cached.
            source_MCHW, rows_N: all images, and those of the batch.
            tops_N, lefts_N, flips_N: their crops.
            slots_N: of the feature cache.
        """
        inputs = self._inputs(source_MCHW, rows_N, labels_N, tops_N, lefts_N, flips_N)
        features: Features | None = None
        if self.taught:
            assert self.teacher is not None
            if self.cache is not None and known:
                features = self.cache.read(slots_N, partial(self.teacher.arguments, inputs))
            else:
                features = self.teacher(inputs)
                if self.cache is not None:
                    self.cache.write(slots_N, features)
        return self.step(self.optimizer, inputs, labels_N, features)

    def _end_epoch(self) -> None:
        """Validate, log, and write a checkpoint if one is due."""
        position, recipe = self.position, self.recipe
        self._gather()
        with self._unhurried():
            position.validation = self.ranks.on_first(self._validate, not self.phase.objective.needs_chain)
        self.step.prepare()
        steps = steps_per_epoch(self.data.train, recipe.batch_size)
        row: Row = {
            "phase": self.phase.name,
            "epoch": position.epochs_done + 1,
            "epochs": self.epochs,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            **{name: total / steps for name, total in position.sums.items()},
            **position.validation.row("validation"),
            "seconds": round(position.seconds, 3),
            "images_per_second": round(steps * recipe.batch_size / position.seconds, 1),
        }
        position.end_epoch(row)
        if self.ranks.first:
            self.selection.offer(self.student, position.validation)
        self._before_epoch = None
        self._log.write(row)
        self.progress.on_validation_end(row)
        # None between two phases: optimizer and schedule are one phase's. The next phase writes it as it begins.
        between = position.epoch == self.phase.settings.epochs and not self.trained
        if not between and max(self.ranks.totals([float(self._due())])):
            self.checkpoint()

    def _validate(self, apart: bool) -> Score:
        """The student's score. Blocks that were copied or trained apart need statistics of its own chain first."""
        if apart:
            estimate_statistics(self.student, self.sections, self._samples(ESTIMATION_BATCHES), self.precision)
        return evaluate(self.student, self.data.validation, self.spec, self.precision, self.reference, self.functions)

    def _measure_cut(self) -> None:
        """Measure the student before its first step. All ranks call it."""
        position = self.position
        with self._unhurried(), unchanged(self.student):
            position.cut = self.ranks.on_first(self._validate, True)
            if self.ranks.first:
                self.selection.offer(self.student, position.cut)
        self.step.prepare()
        self.note(f"the cut alone: {position.cut.summary()} on validation")
        measured = position.cut.row("validation")
        position.rows.append({"phase": CUT, "epoch": position.epochs_done, "epochs": self.epochs, **measured})
        self._log.write(position.rows[-1])
        self.progress.on_validation_end(position.rows[-1])

    def _unhurried(self) -> AbstractContextManager[None]:
        """Work that may stop anywhere. With several ranks, one would stop while the others wait for it."""
        return self.interruption.released() if self.ranks.size == 1 else nullcontext()

    # Phases.

    @contextmanager
    def begun(self, phase: TrainingPhase) -> Iterator[None]:
        """A phase in progress: its share of the work on this rank, step, optimizer and schedule."""
        if self.saved is None:
            self.ranks.copy(self.student.state_dict().values())
            if phase.transition is not None:
                phase.transition.apply(self)
        # Not around the whole run: a transition may replace parameters.
        with synchronized(self.student, self.ranks) if self._synchronizes else nullcontext():
            sections = self._share(phase)
            self.taught = self.phase.objective.needs_teacher
            with self._new_step(sections) as self.step:
                self.optimizer = new_optimizer(self.student, self.recipe, phase.settings, self.device)
                steps = steps_per_epoch(self.data.train, self.recipe.batch_size)
                self.schedule = new_schedule(self.optimizer, phase.settings, steps)
                self.monitor = LossMonitor(
                    self.position, self.phase, self.optimizer, self.ranks, self.sharing.size, self.owners
                )
                # On CUDA with all tensors there. Not yet with several ranks, or of the user's own objects.
                captures = (
                    self.device.type == "cuda"
                    and self.ranks.size == 1
                    and (self.cache is None or not self.cache.mapped)
                    and not self.data.given
                )
                wrap: Callable[[Any], Any] = Captured if captures else lambda function: function
                self._update_new, self._update_cached = (wrap(partial(self._update, known)) for known in (False, True))
                if self.saved is not None:
                    self._restore(self.saved, in_phase=True)
                elif self.position.steps_done == 0:
                    if self.cache is not None and self.cache.mapped:
                        self.checkpoint()  # of which features were cached before the run
                elif max(self.ranks.totals([float(self._due())])):
                    self.checkpoint()
                yield

    def _share(self, phase: TrainingPhase) -> list[Section]:
        """Set what this rank trains of a phase: its part of each batch, or its own sections of all of it.

        Sets `phase`, `sharing` (the ranks that share a batch) and `owners` (section → its rank, if divided).

        Returns:
            The sections that this rank trains.
        """
        objective = phase.objective
        self.phase, self.sharing, self.owners = phase, self.ranks, dict[str, int]()
        if self.ranks.size == 1 or self.recipe.parallel == "data" or not isinstance(objective, LitSections):
            return list(self.sections)
        self.owners = divide(section_flops(self.student, self.sections, self.example), self.ranks)
        own = [each for each in self.sections if self.owners.get(each.name) == self.ranks.rank]
        self.phase, self.sharing = replace(phase, objective=objective.only([each.name for each in own])), ALONE
        return own

    def _new_step(self, sections: Sequence[Section]) -> Step:
        """The phase's step, compiled if the recipe says so or it pays."""
        images = self.phase.settings.epochs * len(self.data.train) / self.sharing.size
        # Backward takes twice as long as forward.
        flops = 3 * images * forward_flops(self.student, self.example)
        compiled = compiles_step(self.recipe.compile, flops, self.device) and not self._synchronizes
        report = fallback(self.recipe.compile, self.progress.note)
        how = (self.precision, compiled, report, self.sharing, self.spec.task_name)
        return Step(self.student, self.phase.objective, sections, *how)

    def _gather(self) -> None:
        """Make the student whole for evaluation: fetch divided sections from their owners, and average batch norm
        statistics of each rank's part of the batches."""
        for section in self.sections if self.owners else ():
            for block in section.blocks_in(self.student):
                self.ranks.copy(block.state_dict().values(), self.owners[section.name])
        if not self._synchronizes:
            average_statistics(self.student, self.sharing)

    @property
    def _synchronizes(self) -> bool:
        return self.ranks.size > 1 and self.recipe.batch_norm == "synchronised"

    @property
    def epochs(self) -> int:
        """Epochs of all phases."""
        return sum(phase.settings.epochs for phase in self.phases)

    @property
    def trained(self) -> bool:
        """Whether all phases are over."""
        return self.position.epochs_done == self.epochs

    @property
    def elapsed(self) -> float:
        """Seconds of wall-clock time, in all processes of the run."""
        return self.position.elapsed + time.perf_counter() - self._started

    # What a transition between two phases uses: see `methods.method.Training`.

    @property
    def validation(self) -> Score | None:
        return self.position.validation

    def note(self, text: str) -> None:
        self.progress.note(text)

    def on_first_rank(self, function: Callable[..., Any], *args: Any) -> None:
        self.ranks.on_first(function, *args)

    def teach_with(self, module: nn.Module) -> None:
        assert self.teacher is not None
        self.teacher = self.teacher.of(module)
        self.cache = None if self.cache is None else self.cache.emptied()

    # Batches.

    def _inputs(
        self, source_MCHW: Batch, rows_N: Tensor, labels_N: Tensor, tops_N: Tensor, lefts_N: Tensor, flips_N: Tensor
    ) -> Batch:
        """The student's inputs: the augmented batch, and what its task asks of the network for it."""
        image = self.input.images
        if image is None or self.data.given:
            return prepared(Picked(source_MCHW, rows_N, labels_N).images(), self.input)
        assert isinstance(source_MCHW, Tensor)
        crops = Crops(tops_N, lefts_N, flips_N, self._augmentation.padding or 0)
        dtype = DTYPES[self.precision]
        images_NCHW = kernels.augmented(source_MCHW, rows_N, crops, image, dtype)
        return task_of(self.input).training_inputs(images_NCHW, labels_N, self.input)

    def _augmented(self, picked: Picked, crops: Crops) -> Batch:
        """The student's inputs of a batch that is not trained on."""
        crops = crops.to(picked.labels_N.device)
        cut = (crops.tops_N, crops.lefts_N, crops.flips_N)
        return self._inputs(picked.source_MCHW, picked.rows_N, picked.labels_N, *cut)

    def _samples(self, batches: int) -> Iterator[Batch]:
        """Inputs of at most this many batches, augmented as in a step.

        The same at each call and on each rank: their own generators draw them, so that no step sees other ones.
        """
        order, draws = (torch.Generator().manual_seed(self.recipe.seed) for _ in range(2))
        split, size = self.data.train, self.recipe.batch_size
        for picked in split.pick(shuffled(len(split), size, order)[:batches]):
            yield self._augmented(picked, draw_crops(size, self._augmentation, draws))

    # Stopping and resuming.

    def resumable(self, where: Path, interrupted: Callable[[], None] | None = None) -> AbstractContextManager[None]:
        """Receive signals, and tell the user how to resume after an error. See `interruption.resumable`."""
        position = self.position
        self.checkpoints.begin(position.epochs_done, position.steps_done)

        def so_far() -> str:
            steps = f" and {position.step} steps" if position.step else ""
            return f"{where}: interrupted after {position.epochs_done} of {self.epochs} epochs{steps}"

        advice = self.checkpoints.advice
        return resumable(self.interruption, so_far, advice, interrupted, self.ranks.first)

    def _stoppable(self) -> AbstractContextManager[None]:
        """Write a checkpoint if an epoch is stopped while no step is half done. See `interruption.stoppable`."""
        return stoppable(self.interruption, lambda: self.stepping, self.checkpoint, self.ranks.size == 1)

    def _out_of_memory(self) -> TrainingError:
        size = self.recipe.batch_size
        if self.interruption.lacking == "host":
            return out_of_host_memory(size)
        # Frees the optimizer's state and the captured graphs.
        del self.optimizer, self.schedule, self.monitor, self._update_new, self._update_cached
        return out_of_memory(size, None if self._synchronizes else self._try_batch, self.device)

    def _try_batch(self, images: int) -> None:
        """Run forward and backward of this rank's part of a batch of zeros."""
        images = max(1, images // self.sharing.size)
        inputs = mapped(lambda tensor: tensor.new_zeros(images, *tensor.shape[1:]), self.example)
        labels = self.data.train.labels.new_zeros(images, *self.data.train.labels.shape[1:])
        features = self.teacher.eager(inputs) if self.teacher is not None and self.taught else None
        self.step.losses(inputs, labels, features)["loss"].backward()  # type: ignore[no-untyped-call]

    def _due(self) -> bool:
        """Whether a checkpoint is due; the first rank decides."""
        return self.ranks.first and self.checkpoints.due(self.position.epochs_done, self.position.steps_done)

    def checkpoint(self, in_phase: bool = True) -> None:
        """Write a checkpoint. All ranks call it.

        Args:
            in_phase: False after all phases; the first rank alone calls it then.

        Raises:
            BundleError: it cannot be written; earlier ones stay.
            TrainingError: a weight is not finite.
        """
        if in_phase:
            self.monitor.look()
        position, snapshot = self.position, self._snapshot(in_phase)
        on_first = self.ranks.on_first if in_phase else ALONE.on_first
        on_first(self.checkpoints.write, position.epochs_done, position.step, snapshot)
        self.progress.on_checkpoint(position.epochs_done, position.step)
        self.checkpoints.begin(position.epochs_done, position.steps_done)

    def _snapshot(self, in_phase: bool) -> Snapshot:
        """The run's state between two steps. All ranks call it; the first gets the state of all."""
        position, cache = self.position, self.cache
        found = {f"student/{key}": value for key, value in self.student.state_dict().items()}
        found |= self.selection.tensors()
        facts: dict[str, Any] = {
            "position": {**position.model_dump(mode="json"), "elapsed": self.elapsed},
            "spec": self.spec.model_dump(mode="json"),
        }
        if in_phase:
            found |= optimizer_tensors(self.student, self.optimizer)
            # The order's state at the beginning of the epoch: the steps done are drawn again, and skipped.
            before = self._before_epoch
            found |= random_tensors(self.order.get_state() if before is None else before[0], self.draws, self.device)
            facts["learning_rates"] = [float(group["lr"]) for group in self.optimizer.param_groups]
            facts["schedule"] = self.schedule.last_epoch
        if cache is not None:
            found |= {f"cache/{key}": value for key, value in cache.marks().items()}
        tensors = cloned(found)
        bad = not_finite(tensors)
        if self.ranks.totals([float(bool(bad))])[0] if in_phase else bad:
            raise no_longer_finite(position, bad, self.recipe)
        if in_phase and self.ranks.size > 1:
            own = dict(tensors)
            for rank, theirs in enumerate(self.ranks.gather(tensors)):
                tensors |= differing_from(own, theirs, rank)
        if cache is not None:
            cache.flush()
            # A pass in progress will begin again.
            begun = in_phase and self.taught and self._before_epoch is not None
            facts["cache"] = {"views": cache.views, "passes": cache.passes - begun, "began_empty": cache.began_empty}
        return Snapshot(tensors, facts)

    def _rebuild(self, saved: Snapshot) -> None:
        """Give the student its saved shape and redo transitions; `_restore` fills it.

        Raises:
            BundleError: the snapshot is not of this student.
            LitdeployError: a file of the run's folder is missing.
        """
        self.spec = saved.spec()
        with of_this_student():
            narrow(self.student, self.spec.widths)
        channels_last(self.student)
        for phase in self.phases[: self.position.phase + 1]:
            if phase.transition is not None:
                phase.transition.restore(self)

    def _restore(self, saved: Snapshot, in_phase: bool) -> None:
        """Restore the snapshot on this rank.

        Args:
            in_phase: False: all phases are over.

        Raises:
            BundleError: the snapshot is not of this student.
            TrainingError: the cached features are gone.
        """
        tensors, facts = saved.of_rank(self.ranks.rank), saved.facts
        with of_this_student():
            restore_student(self.student, tensors)
            if self.ranks.first:
                self.selection.restore(tensors)
            if in_phase:
                restore_optimizer(self.student, self.optimizer, self.schedule, tensors, facts)
                restore_random(self.order, self.draws, self.device, tensors)
        if in_phase and self.cache is not None:
            known = facts["cache"]
            if not self.cache.restore(tensors["cache/cuts"], tensors["cache/filled"], known["began_empty"]):
                self.note("feature cache: computing the features again")
                self._refill(self.cache)
            self.cache.passes = int(known["passes"])
        self.saved = None

    def _refill(self, cache: FeatureCache) -> None:
        """Fill an empty cache as the run had filled it up to its position."""
        assert self.teacher is not None
        teacher, position = self.teacher, self.position
        passes = passes_until(self.phases, position.phase, position.epoch, position.step)
        size, seed = self.recipe.batch_size, self.recipe.seed
        draw = partial(draw_crops, size, self._augmentation)
        refill(cache, self.data.train, size, seed, passes, draw, lambda *batch: teacher(self._augmented(*batch)))
