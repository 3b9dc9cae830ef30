from __future__ import annotations

from pathlib import Path

import pytest
import torch

from litdeploy.config.spec import CharacterInput
from litdeploy.config.target import Target
from litdeploy.errors import NetworkError, StudentError
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.exporter.parity import compare_runners
from litdeploy.networks import FAMILIES, Network, describe, find_sections, load, new
from litdeploy.networks.families.vdcnn import BLOCKS, VDCNN, vdcnn
from litdeploy.networks.student import plan_for_depth
from litdeploy.runtime import open_runner

CPU = torch.device("cpu")
TEXTS = torch.randint(69, (3, 80), generator=torch.Generator().manual_seed(0))


def small(depth: int, **arguments: bool) -> VDCNN:
    return vdcnn(depth, classes=3, width=4, hidden=8, **arguments).eval()


@pytest.mark.parametrize(("depth", "shortcut"), [(9, False), (17, True), (29, False), (49, True)])
def test_the_published_depths(depth: int, shortcut: bool) -> None:
    network = small(depth, shortcut=shortcut)
    convolutions = [name for name, child in network.named_modules() if isinstance(child, torch.nn.Conv1d)]
    assert len([name for name in convolutions if "shortcut" not in name]) == depth
    assert network(TEXTS).shape == (3, 3)
    if depth > 9:
        # Twice as wide and half as long from section to section.
        shapes = [section.output_shape for section in find_sections(network, TEXTS)]
        assert shapes == [(4, 80), (8, 40), (16, 20), (32, 10)]


def test_other_depths_and_texts_that_are_too_short_are_refused() -> None:
    with pytest.raises(NetworkError, match="9, 17, 29, 49, not 11"):
        vdcnn(11)
    with pytest.raises(NetworkError, match="--text-length 64"):
        small(9)(TEXTS[:, :63])


@pytest.mark.parametrize("shortcut", [False, True])
def test_its_weights_are_recognised(tmp_path: Path, shortcut: bool) -> None:
    network = small(29, shortcut=shortcut)
    torch.save(network.state_dict(), tmp_path / "t.pt")
    found = load(tmp_path / "t.pt", input_shape=(80,))
    assert describe(found.spec.name, found.spec.arguments) == (
        f"vdcnn,depth=29,classes=3,shortcut={str(shortcut).lower()},width=4,hidden=8,vocabulary=69"
    )
    assert found.spec.input == CharacterInput(length=80)
    assert torch.equal(found.module(TEXTS), network(TEXTS))


def test_another_alphabet_must_be_given(tmp_path: Path) -> None:
    torch.save(vdcnn(9, width=4, hidden=8, vocabulary=5).state_dict(), tmp_path / "t.pt")
    with pytest.raises(NetworkError, match="the published alphabet has 69"):
        load(tmp_path / "t.pt")
    spec = CharacterInput(length=80, alphabet="abc")
    assert load(tmp_path / "t.pt", input=spec).spec.input == spec


def test_students_have_the_published_blocks() -> None:
    network = small(49)
    sections = find_sections(network, TEXTS)
    assert [section.blocks for section in sections] == [8, 8, 5, 3]
    for depth, blocks in BLOCKS.items():
        plan = plan_for_depth(sections, depth, FAMILIES["vdcnn"])
        assert tuple(len(kept) for kept in plan.values()) == blocks
    shallow = find_sections(small(17), TEXTS)
    with pytest.raises(StudentError, match=r"no deeper than its teacher\. Possible: 9, 17"):
        plan_for_depth(shallow, 29, FAMILIES["vdcnn"])
    with pytest.raises(StudentError, match="Possible: 9, 17"):
        plan_for_depth(shallow, 13, FAMILIES["vdcnn"])


def test_it_is_exported_for_any_batch(tmp_path: Path) -> None:
    made = new("vdcnn9,width=4,hidden=8", normalise=None, input_shape=(80,), classes=3, seed=0)
    network = Network(made.module.eval(), made.spec, made.source)
    details = export_onnx(network, tmp_path / "v.onnx", None)
    assert (details["inputs"], details["unfolded_batch_norms"]) == ({"characters": ["batch", 80]}, 0)
    with (
        open_runner("eager", network=network, device=CPU) as reference,
        open_runner("onnxruntime", path=tmp_path / "v.onnx", device=CPU) as candidate,
    ):
        found = compare_runners(
            reference, candidate, network.example(32), (1, 8, 32), Target().tolerance.fp32, network.spec
        )
    assert found.within, found.summary()
