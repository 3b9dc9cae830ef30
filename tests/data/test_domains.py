from __future__ import annotations

import torch

from litdeploy.data.domains import as_vectors, others, swapped


def test_exclusive_domains_and_attributes_become_vectors() -> None:
    assert as_vectors(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert as_vectors(torch.tensor([[1, 1, 0]]), 3).tolist() == [[1, 1, 0]]


def test_training_keeps_the_labels_share_and_measuring_goes_through_all_other_domains() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    assert sorted(swapped(labels).tolist()) == labels.tolist()
    targets = others(labels, 3)
    assert (targets != labels).all()
    assert targets.tolist() == [1, 2, 1, 0, 2, 0, 0]
    # In parts, the same as at once.
    assert torch.equal(torch.cat([others(labels[:3], 3), others(labels[3:], 3, first=3)]), targets)


def test_attributes_are_those_of_another_image() -> None:
    labels = torch.tensor([[1, 0], [0, 1], [1, 1]])
    assert others(labels, 2).tolist() == [[1, 1], [1, 0], [0, 1]]
