"""Pieces of work that know nothing of each other, side by side on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def side_by_side(
    main: Callable[[], Tensor], others: Sequence[Callable[[], Tensor]], streams: Sequence[torch.cuda.Stream]
) -> tuple[Tensor, list[Tensor]]:
    """Calls `main` on the current stream and each other function on one of its own, forked from it and joined again.

    Autograd runs each operation's backward on the stream of its forward, so the backward passes lie side by side too. A
    CUDA graph that captures the current stream captures the others with it.

    Args:
        main, others: all that they read was queued on the current stream before.
        streams: one for each other function; none at all: they run one after the other, where they are.
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
        tensor.record_stream(here)  # or its memory could be given away while it is still read here
    return result, results
