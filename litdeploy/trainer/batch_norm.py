"""Batch norm statistics: synchronized among ranks, averaged over them, or estimated afterwards.

Shape suffixes: N images, C channels, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from litdeploy.batch import Batch, device_of, forward
from litdeploy.errors import SettingsError
from litdeploy.networks.sections import Section
from litdeploy.trainer.distributed import Ranks

# Number of batches that a running average with a momentum of 0.1 in effect covers: 2 / 0.1 - 1, rounded up.
ESTIMATION_BATCHES = 20


class SynchronizedBatchNorm(_BatchNorm):
    """A batch norm whose training steps normalize by the statistics of the whole batch, across all ranks.

    It has the parameters and running statistics of the one it replaces: the same tensors under the same names. In eval
    mode and without gradients it exchanges nothing and is an ordinary batch norm.

    torch's own `SyncBatchNorm` works on CUDA only; this one on any device. It is composed of plain operations, slower
    than a fused batch norm, and exchanges in the middle of the step, which is therefore not compiled.

    Args:
        norm: any of `BatchNorm1d`, `2d`, `3d`, or a subclass that runs its own modules after normalizing.
        ranks: each with an equal part of the batch.
    """

    def __init__(self, norm: _BatchNorm, ranks: Ranks) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, False, False)
        self.affine, self.track_running_stats = norm.affine, norm.track_running_stats
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self._tail = tuple(name for name, _ in norm.named_children())
        for name, child in norm.named_children():
            self.add_module(name, child)
        self.training = norm.training
        self._ranks = ranks

    def _check_input_dim(self, input: Tensor) -> None:
        """The norm that it replaces checked this in the first forward pass."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, …) → the same shape and type; the arithmetic is at least float32."""
        normalized = self._normalized if self.training and torch.is_grad_enabled() else super().forward
        y = normalized(input)
        for name in self._tail:
            y = self.get_submodule(name)(y)
        return y

    def _normalized(self, input: Tensor) -> Tensor:
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        var_C, mean_C = torch.var_mean(x, [dim for dim in range(x.dim()) if dim != 1], correction=0)
        means_RC, vars_RC = _of_all_ranks(torch.cat([mean_C, var_C]), self._ranks).chunk(2, dim=1)
        mean_C = means_RC.mean(0)
        # Parts are equal: the whole's variance is that inside the parts plus that between them (Chan et al., 1979).
        var_C = vars_RC.mean(0) + (means_RC - mean_C).square().mean(0)
        self._follow(mean_C.detach(), var_C.detach(), self._ranks.size * x.numel() // len(mean_C))
        scale_C: Tensor = torch.rsqrt(var_C + self.eps)
        shape = [1, -1] + [1] * (x.dim() - 2)
        if self.weight is not None:
            scale_C = scale_C * self.weight
        y: Tensor = (x - mean_C.view(shape)) * scale_C.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean_C: Tensor, var_C: Tensor, count: int) -> None:
        """Update the running statistics, if there are any, as an ordinary batch norm does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        factor = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C, factor)
        self.running_var.lerp_(var_C * (count / (count - 1)), factor)


class _OfAllRanks(torch.autograd.Function):
    """A row of each rank → all rows on each rank. Backward: each row's gradient is the sum over all ranks."""

    @staticmethod
    def forward(ctx: Any, row_C: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        rows_RC = row_C.new_zeros(ranks.size, len(row_C))
        rows_RC[ranks.rank] = row_C
        ranks.sum(rows_RC)
        return rows_RC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_RC = grads[0].clone(memory_format=torch.contiguous_format)
        ctx.ranks.sum(grad_RC)
        return grad_RC[ctx.ranks.rank], None


def _of_all_ranks(row_C: Tensor, ranks: Ranks) -> Tensor:
    rows_RC: Tensor = _OfAllRanks.apply(row_C, ranks)  # type: ignore[no-untyped-call]
    return rows_RC


@contextmanager
def synchronized(student: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Replace the student's batch norms by synchronized ones while it is open. The state dict stays the same.

    Raises:
        SettingsError: a batch norm has its own arithmetic.
    """
    places = [
        (parent, name, norm)
        for parent in student.modules()
        for name, norm in parent.named_children()
        if isinstance(norm, _BatchNorm)
    ]
    for *_, norm in places:
        own = type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        if own and not any(norm.children()):
            raise SettingsError(
                f"--batch-norm synchronised: the network's {type(norm).__name__} is no batch norm of torch's, and its "
                "arithmetic is unknown. Leave it out: each process then normalizes by its own part of a batch."
            )
    for parent, name, norm in places:
        setattr(parent, name, SynchronizedBatchNorm(norm, ranks))
    try:
        yield
    finally:
        for parent, name, norm in places:
            setattr(parent, name, norm.train(parent.get_submodule(name).training))


def average_statistics(student: nn.Module, ranks: Ranks) -> None:
    """Replace the running statistics by their mean over the ranks, each of which saw its own part of the batches."""
    norms = [module for module in student.modules() if isinstance(module, _BatchNorm)]
    kept = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
    ranks.average(statistic for statistic in kept if statistic is not None)


@torch.no_grad()
def estimate_statistics(
    student: nn.Module, sections: Sequence[Section], batches: Iterable[Batch], precision: str = "fp32"
) -> None:
    """Estimate the running statistics of the sections in the student's own chain.

    For a student whose sections were trained apart: no step ran the chain. The mean over all batches replaces a
    running average, which would follow weights that were still changing.

    Args:
        sections: left in training mode; the rest of the student keeps its mode.
        batches: the student's inputs; see `ESTIMATION_BATCHES`.
        precision: `fp32`, or `bf16` by autocast.
    """
    blocks = [block.train() for section in sections for block in section.blocks_in(student)]
    norms = [module for block in blocks for module in block.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all
    for batch in batches:
        with torch.autocast(device_of(batch).type, torch.bfloat16, enabled=precision == "bf16"):
            forward(student, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
