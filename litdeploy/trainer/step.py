"""One training step: the student's sections on the teacher's inputs, the student's own chain, and the update.

Also how a step runs fast: sections side by side on CUDA streams, `torch.compile`, and capture as a CUDA graph.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from litdeploy.batch import Batch, cast, device_of, forward, size_of, tensors_of
from litdeploy.config.recipe import Choice
from litdeploy.errors import CompilationError
from litdeploy.networks.network import counting
from litdeploy.networks.output import answer_of
from litdeploy.networks.sections import Section, recording, run_section
from litdeploy.runtime import compilation
from litdeploy.trainer.distributed import ALONE, Ranks
from litdeploy.trainer.objectives import Objective, Outputs
from litdeploy.trainer.teacher import Features

# Floating-point operations of a whole run from which on compiling saves more time than it takes. On two CPU cores in
# bf16 (benchmarks/results/amd-epyc-2-cores): a teacher takes 5 to 10 s to compile and then saves 0.35 s in 10^12; the
# step of a ResNet-20 takes 47 s and saves 0.3 s in 10^12.
_TEACHER_PAYS = 50e12
_STEP_PAYS = 300e12

# Real steps that run before the capture: libraries choose their algorithms, the optimizer creates its state.
_EAGER_STEPS = 3


class Step:
    """The training step of one phase: forward, backward and update.

    A context manager: while it is open, the student carries hooks.

    Args:
        student: trained in place; its modes are set for the objective.
        objective: the loss.
        sections: the student's planned sections, in order.
        precision: `fp32`, or `bf16` by autocast.
        compiled: run forward and backward through `torch.compile`.
        fallback: called with the reason if compilation fails; the step then runs eagerly. None: raise an error.
        ranks: those that share each batch; gradients are averaged over them.
        task: that the student's answer is of.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        sections: Sequence[Section],
        precision: str = "fp32",
        compiled: bool = False,
        fallback: Callable[[str], None] | None = None,
        ranks: Ranks = ALONE,
        task: str = "classification",
    ) -> None:
        self.student = student
        self._task = task
        self.objective = objective
        self._sections = {section.name: section for section in sections}
        self._ranks = ranks
        self.prepare()
        self.precision = precision
        self._in_chain = in_chain(objective, sections)
        needed = inputs_needed(objective, sections)
        self._branches = {
            section.name: without_statistics(section.blocks_in(student))
            for section in sections
            if section.name in needed
        }
        self._hooks = ExitStack()
        recorded = [self._sections[name] for name in (*self._in_chain, *objective.chain)]
        self._own = self._hooks.enter_context(recording(student, recorded))
        for module in (student, *self._branches.values()):
            self._hooks.enter_context(_plain_group_norms(module))
            self._hooks.enter_context(_subsampled_convolutions(module))
        # A compiled function has its own order.
        device = next(student.parameters()).device
        side = len(self._branches) if device.type == "cuda" and not compiled else 0
        self._streams = [torch.cuda.Stream(device) for _ in range(side)]  # type: ignore[no-untyped-call]
        self._compute = compilation.compiled(self.losses, fallback=fallback) if compiled else self.losses

    def prepare(self) -> None:
        """Set the student's training mode, for example after an evaluation."""
        prepare(self.student, self.objective, self._sections.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    def __call__(
        self,
        optimizer: torch.optim.Optimizer,
        inputs: Batch,
        labels_N: Tensor,
        features: Features | None,
    ) -> dict[str, Tensor]:
        """Make one update. Return the losses of this rank's part of the batch by name, detached, on the device."""
        losses = self._compute(inputs, labels_N, features)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._ranks.average(parameter.grad for parameter in trained if parameter.grad is not None)
        optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def losses(self, inputs: Batch, labels_N: Tensor, features: Features | None) -> dict[str, Tensor]:
        """The objective's losses of a batch.

        Args:
            inputs: the student's inputs: normalized images, float32 or in autocast's dtype; ids (N, L) of texts; or
                images with the domains to translate them to.
            labels_N: int64.
            features: the teacher's for these inputs; None if the objective needs none.
        """
        with torch.autocast(device_of(inputs).type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.objective.losses(self.outputs(inputs, labels_N, features))

    def outputs(self, inputs: Batch, labels_N: Tensor, features: Features | None) -> Outputs:
        """The tensors that the objective compares. See `losses`."""
        calls = {} if features is None else features.calls
        branches = [
            partial(run_section, list(twin), calls[name].input, self._sections[name].own(calls[name].arguments))
            for name, twin in self._branches.items()
        ]
        output, outputs = side_by_side(partial(self._chain, inputs), branches, self._streams)
        own = self._own
        ran = dict(zip(self._branches, outputs, strict=True))
        ran |= {name: own[name].output for name in self._in_chain}
        return Outputs(
            output=cast(output, torch.float32),
            labels=labels_N,
            teacher_output=None if features is None else features.output,
            branches={name: (ran[name], calls[name].output) for name in self.objective.branches},
            chain={name: (own[name].output, calls[name].output) for name in self.objective.chain},
            inputs=inputs,
            again=self._chain,
        )

    def _chain(self, inputs: Batch) -> Batch:
        """The student's own answer; empty if the objective needs none."""
        if not self.objective.needs_chain:
            return tensors_of(inputs)[0].new_empty(0)
        return answer_of(forward(self.student, inputs), self._task)


def prepare(student: nn.Module, objective: Objective, sections: Iterable[Section]) -> None:
    """Set the student's training mode and gradients for an objective.

    If the objective freezes, all but `sections` keeps its weights and, in eval mode, its batch norm statistics. The
    stem, a copy of the teacher's, then computes exactly T_0.
    """
    student.train().requires_grad_(True)
    if objective.freezes:
        student.eval().requires_grad_(False)
        for section in sections:
            for block in section.blocks_in(student):
                block.train().requires_grad_(True)


def without_statistics(blocks: Sequence[nn.Module]) -> nn.ModuleList:
    """Make twins of a section's blocks with the same parameters, whose batch norms normalize by their batch and keep no
    running statistics.

    LIT runs each section twice in a step: on the teacher's input and in the student's own chain. Both passes train the
    same weights, but only the chain is deployed. If the pass on the teacher's input moved the running statistics too,
    they would describe a mixture of two distributions, which costs accuracy.
    """
    shared = {id(parameter): parameter for block in blocks for parameter in block.parameters()}
    twin = nn.ModuleList(copy.deepcopy(list(blocks), shared))
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return twin


def in_chain(objective: Objective, sections: Sequence[Section]) -> tuple[str, ...]:
    """The branch that the student's own chain already computes: its first section, behind a frozen stem.

    The frozen stem is the teacher's, so the chain's first section runs on T_0 in any case: S_1(T_0) is the chain's own
    S_1. It runs once, for both losses.
    """
    shared = objective.freezes and objective.needs_chain
    return tuple(section.name for section in sections[:1] if shared and section.name in objective.branches)


def inputs_needed(objective: Objective, sections: Sequence[Section]) -> set[str]:
    """Sections whose input in the teacher a step needs."""
    return set(objective.branches) - set(in_chain(objective, sections))


def outputs_needed(objective: Objective) -> set[str]:
    """Sections whose output in the teacher an objective compares."""
    return {*objective.branches, *objective.chain}


@contextmanager
def _plain_group_norms(module: nn.Module) -> Iterator[None]:
    """Make channels-last inputs of group norms contiguous if they carry no gradient, as the teacher's tensors do.

    On a CPU the group norm's backward pass otherwise reads a gradient that does not exist, and the process dies
    (torch 2.11 to 2.13).
    """

    def contiguous(norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        return args if x.requires_grad or x.device.type != "cpu" else (x.contiguous(), *args[1:])

    norms = [norm for norm in module.modules() if isinstance(norm, nn.GroupNorm)]
    handles = [norm.register_forward_pre_hook(contiguous) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _subsampled_convolutions(module: nn.Module) -> Iterator[None]:
    """Run strided 1×1 convolutions of few input channels on a CPU as subsampling and a convolution of stride 1.

    Both compute the same function. But oneDNN's backward pass of the strided one writes past its workspace in
    channels-last memory if there are fewer input channels than a vector has numbers: 8 with AVX2, 16 with AVX-512. The
    process then aborts or hangs, or the weights get wrong gradients (torch 2.13,
    https://github.com/uxlfoundation/oneDNN/issues/6035).
    """

    def subsampling(stride: tuple[int, ...]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        down, across = stride
        return lambda convolution, args: (args[0][..., ::down, ::across], *args[1:])

    with ExitStack() as restored:
        for each in module.modules():
            if isinstance(each, nn.Conv2d) and _is_small_and_strided(each):
                handle = each.register_forward_pre_hook(subsampling(each.stride))
                restored.callback(handle.remove)
                restored.callback(setattr, each, "stride", each.stride)
                each.stride = (1, 1)
        yield


def _is_small_and_strided(convolution: nn.Conv2d) -> bool:
    return (
        convolution.weight.device.type == "cpu"
        and convolution.kernel_size == (1, 1)
        and convolution.padding in ((0, 0), "valid")
        and convolution.groups == 1
        and convolution.stride != (1, 1)
        and convolution.in_channels < 16
    )


def side_by_side(
    main: Callable[[], Batch], others: Sequence[Callable[[], Tensor]], streams: Sequence[torch.cuda.Stream]
) -> tuple[Batch, list[Tensor]]:
    """Call `main` on the current stream and each other function on its own stream, forked from it and joined again.

    Autograd runs each operation's backward on the stream of its forward, so the backward passes overlap too. A CUDA
    graph that captures the current stream captures the others with it.

    Args:
        main, others: functions whose inputs were queued on the current stream before.
        streams: one for each other function; empty: run them one after the other.
    """
    if not streams:
        return main(), [function() for function in others]
    here = torch.cuda.current_stream(streams[0].device)
    results = []
    for function, stream in zip(others, streams, strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            results.append(function())
    result = main()
    for tensor, stream in zip(results, streams, strict=True):
        here.wait_stream(stream)
        tensor.record_stream(here)  # or its memory could be reused while it is still read here
    return result, results


@torch.no_grad()
def forward_flops(module: nn.Module, example: Batch) -> int:
    """Floating-point operations of one image's forward pass; a multiply-add counts as two, elementwise work as none."""
    module = copy.deepcopy(module).eval()
    with counting() as counted:
        forward(module, example)
    return int(counted.get_total_flops()) // size_of(example)


@torch.no_grad()
def section_flops(module: nn.Module, sections: Sequence[Section], example: Batch) -> dict[str, int]:
    """Section → floating-point operations of one image's forward pass through it, counted as by `forward_flops`."""
    module = copy.deepcopy(module).eval()
    with recording(module, sections) as calls:
        forward(module, example)
    found = {}
    for section in sections:
        if section.name not in calls:  # it has no blocks
            continue
        call = calls[section.name]
        with counting() as counted:
            run_section(section.blocks_in(module), call.input, call.arguments)
        found[section.name] = int(counted.get_total_flops()) // size_of(example)
    return found


def compiles_teacher(setting: Choice, flops: float, device: torch.device) -> bool:
    """Whether to compile the teacher. `flops`: of all its passes in the run. `auto` never does on CUDA, where it is not
    measured."""
    return setting == "on" or (setting == "auto" and device.type == "cpu" and flops >= _TEACHER_PAYS)


def compiles_step(setting: Choice, flops: float, device: torch.device) -> bool:
    """Whether to compile the step. `flops`: of the phase's steps, forward and backward. See `compiles_teacher`."""
    return setting == "on" or (setting == "auto" and device.type == "cpu" and flops >= _STEP_PAYS)


def fallback(setting: Choice, note: Callable[[str], None]) -> Callable[[str], None]:
    """What to do if compilation fails: note it and run the function eagerly.

    Raises:
        CompilationError: when called, if the user insists on compiling.
    """

    def report(why: str) -> None:
        if setting == "on":
            raise CompilationError(
                f"--compile on: torch.compile failed ({why}). It needs a C++ compiler (apt-get install g++) and, on "
                "CUDA, Triton (pip install triton). Or train without: --compile off"
            )
        note(f"warning: not compiled, and slower for it: {why}")

    return report


class Captured:
    """A function of tensors, captured in a CUDA graph after a few calls and replayed from then on.

    Its tensors must have the same shapes in each call. A tensor that is the same object in each call, such as a
    dataset, is read in place; the others are copied to the graph's inputs. The next call overwrites the results.

    If the capture fails (an operation that cannot be captured, memory), it warns and runs the function eagerly.

    Args:
        function: does not synchronize with the host; changes weights and statistics in place.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]]) -> None:
        self._function = function
        self._calls = 0
        self._failed = False
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._given: list[Tensor] = []
        self._outputs: dict[str, Tensor] = {}

    def __call__(self, *tensors: Tensor) -> dict[str, Tensor]:
        """Call the function. Its work is queued on the current stream."""
        self._calls += 1
        if self._failed:
            return self._function(*tensors)
        if self._calls <= _EAGER_STEPS:
            return self._on_own_stream(tensors)
        if self._graph is None and not self._capture(tensors):
            return self._function(*tensors)
        assert self._graph is not None
        for mine, given, tensor in zip(self._inputs, self._given, tensors, strict=True):
            if tensor is not given:
                mine.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._outputs

    def _on_own_stream(self, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Call the function on the stream that is captured later, as capturing requires."""
        device = tensors[0].device
        self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        here = torch.cuda.current_stream(device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            outputs = self._function(*tensors)
        here.wait_stream(self._stream)
        # Compared by identity: a tensor that stays the same object is not copied.
        self._given = list(tensors)
        return outputs

    def _capture(self, tensors: tuple[Tensor, ...]) -> bool:
        self._inputs = [
            tensor if tensor is given else tensor.clone() for tensor, given in zip(tensors, self._given, strict=True)
        ]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._outputs = self._function(*self._inputs)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            self._failed = True
            self._inputs, self._given = [], []
            torch.cuda.synchronize()
            warnings.warn(
                f"the step could not be captured as a CUDA graph and runs kernel by kernel, slower: "
                f"{str(error).splitlines()[0]}",
                stacklevel=3,
            )
            return False
        self._graph = graph
        return True
