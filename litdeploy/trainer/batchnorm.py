"""Batch norm's statistics: of all ranks together, averaged over them, or estimated afterwards.

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
from litdeploy.networks.sections import container
from litdeploy.trainer.parallel import Ranks

# As many batches as a running average with a momentum of 0.1 in effect remembers: 2 / 0.1 - 1, rounded up.
ESTIMATION_BATCHES = 20


class SynchronisedBatchNorm(_BatchNorm):
    """A batch norm whose training steps normalise by the statistics of the whole batch, on whichever ranks it lies.

    It has the parameters and running statistics of the one that it takes the place of: the same tensors under the same
    names. In eval mode, and where no gradients are asked for, it exchanges nothing and is an ordinary one.

    torch's own `SyncBatchNorm` works on CUDA only; this one on whatever the ranks exchange. It is composed of plain
    operations, slower than a fused batch norm, and exchanges in the middle of the step, which is then not compiled.

    Args:
        norm: any of `BatchNorm1d`, `2d`, `3d`, or one that runs modules of its own after normalising.
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
        """The norm whose place it takes had its say in the first forward pass."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, …) → the same shape and type; the arithmetic is float32 at the least."""
        normalised = self._normalised if self.training and torch.is_grad_enabled() else super().forward
        y = normalised(input)
        for name in self._tail:
            y = self.get_submodule(name)(y)
        return y

    def _normalised(self, input: Tensor) -> Tensor:
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
        """Moves the running statistics, where they are kept, as an ordinary batch norm does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        factor = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C, factor)
        self.running_var.lerp_(var_C * (count / (count - 1)), factor)


class _OfAllRanks(torch.autograd.Function):
    """A row of each rank → all rows on each rank. Backward: each row's gradient is the sum of what all ranks have."""

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
def synchronised(student: nn.Module, ranks: Ranks) -> Iterator[None]:
    """While it is open, the student's batch norms are synchronised ones. Its state dict stays the same.

    Raises:
        SettingsError: one computes in a way of its own.
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
                f"--batch-norm synchronised: the network's {type(norm).__name__} is no batch norm of torch's, and what "
                "else it computes is not known. Leave it out: each process then normalises by its own part of a batch."
            )
    for parent, name, norm in places:
        setattr(parent, name, SynchronisedBatchNorm(norm, ranks))
    try:
        yield
    finally:
        for parent, name, norm in places:
            setattr(parent, name, norm.train(parent.get_submodule(name).training))


def average_statistics(student: nn.Module, ranks: Ranks) -> None:
    """Makes the running statistics the mean of those that the ranks kept, each of its own part of the batches."""
    norms = [module for module in student.modules() if isinstance(module, _BatchNorm)]
    kept = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
    ranks.average(statistic for statistic in kept if statistic is not None)


@torch.no_grad()
def estimate_statistics(
    student: nn.Module, sections: Sequence[str], batches: Iterable[Batch], precision: str = "fp32"
) -> None:
    """Estimates the running statistics of the sections anew, as the student's own chain has them in training mode.

    For a student whose sections were trained one by one: none of their steps ran the chain. The mean over all batches
    takes the place of a running average, which would follow weights that were still changing.

    Args:
        sections: left in training mode; what is around them stays as it is.
        batches: what the student takes, as normalised images (N, C, H, W); see `ESTIMATION_BATCHES`.
        precision: `fp32`, or `bf16` by autocast.
    """
    blocks = [container(student, name).train() for name in sections]
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
