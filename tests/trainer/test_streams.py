from __future__ import annotations

import pytest
import torch

from litdeploy.trainer.streams import side_by_side


def test_without_streams_they_run_where_they_are() -> None:
    found, others = side_by_side(lambda: torch.ones(1), [lambda: torch.zeros(1), lambda: torch.full((1,), 2.0)], [])
    assert (found.item(), [other.item() for other in others]) == (1, [0, 2])


@pytest.mark.gpu
def test_side_by_side_gives_the_same_values_and_gradients() -> None:
    weights = [torch.randn(512, 512, device="cuda", requires_grad=True) for _ in range(4)]
    given = torch.randn(512, 512, device="cuda")

    def work(weight: torch.Tensor) -> torch.Tensor:
        value = given
        for _ in range(20):
            value = torch.tanh(value @ weight)
        return value

    results = []
    for streams in ([], [torch.cuda.Stream() for _ in range(3)]):  # type: ignore[no-untyped-call]
        found, others = side_by_side(
            lambda: work(weights[0]), [lambda i=i: work(weights[i]) for i in (1, 2, 3)], streams
        )
        loss = sum(value.square().mean() for value in (found, *others))
        results.append([loss.detach(), *torch.autograd.grad(loss, weights)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
