from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from litdeploy.errors import SettingsError
from litdeploy.networks import Network, Section, load
from litdeploy.profiler.report.trace import write_trace
from tests import sections
from tests.profiler.conftest import Made

SECTIONS = ["layer1", "layer2", "layer3"]


def marked(networks: dict[str, Network]) -> dict[str, list[Section]]:
    return {role: sections.of(network.module, SECTIONS) for role, network in networks.items()}


def test_calls_sections_and_operators_are_in_the_trace(made: Made, tmp_path: Path) -> None:
    networks = {"teacher": load(made.teacher), "student": load(made.bundle.student_path)}
    path = tmp_path / "new" / "trace.json.gz"
    write_trace(path, networks, marked(networks), torch.device("cpu"), batch_size=2)
    assert [file.name for file in path.parent.iterdir()] == ["trace.json.gz"]
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    ranges = [each for each in events if each.get("cat") == "user_annotation"]
    assert Counter(each["name"] for each in ranges) == {
        f"{role}{section}": 3 for role in ("teacher", "student") for section in ("", *(f" {name}" for name in SECTIONS))
    }
    convolutions = [each for each in events if each["name"] == "aten::conv2d"]
    [student, *_] = [each for each in ranges if each["name"] == "student layer1"]
    inside = [each for each in convolutions if 0 <= each["ts"] - student["ts"] <= student["dur"]]
    assert len(inside) == 2  # the one block that the student kept
    assert len(convolutions) > 6 * len(inside)


def test_a_section_of_which_the_student_has_no_block_has_no_range(made: Made, tmp_path: Path) -> None:
    networks = {"teacher": load(made.teacher), "student": load(made.bundle.student_path)}
    found = marked(networks)
    found["student"] = [replace(found["student"][0], paths=()), *found["student"][1:]]
    write_trace(tmp_path / "trace.json", networks, found, torch.device("cpu"), batch_size=1)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {each["name"] for each in events if each.get("cat") == "user_annotation"}
    assert "student layer1" not in names
    assert {"teacher layer1", "student layer2"} <= names


@pytest.mark.parametrize("name", ["trace", "trace.pt", "taken/trace.json"])
def test_a_file_that_cannot_be(made: Made, tmp_path: Path, name: str) -> None:
    (tmp_path / "taken").write_text("")
    networks = {"teacher": load(made.teacher), "student": load(made.bundle.student_path)}
    with pytest.raises(SettingsError, match="--trace"):
        write_trace(tmp_path / name, networks, marked(networks), torch.device("cpu"), batch_size=1)
