"""In a random tree of files, no command removes or changes a file that litdeploy did not write."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

# Not on the machines that run only what is marked `gpu`.
pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from litdeploy.comparison import compare
from litdeploy.config.target import Target, Timing
from litdeploy.data import pack
from litdeploy.errors import LitdeployError
from litdeploy.exporter import export
from litdeploy.pipeline import deploy
from litdeploy.profiler import profile
from litdeploy.trainer import compress, train

EXAMPLES = int(os.environ.get("LITDEPLOY_EXAMPLES", "25"))
QUICK: dict[str, Any] = {
    "device": "cpu",
    "precision": "fp32",
    "compile": "off",
    "batch_size": 8,
    "feature_cache": "off",
    "main": {"epochs": 1, "learning_rate": 0.05},
    "finetune": {"epochs": 0, "learning_rate": 0.01},
}
TARGET = Target(device="cpu", runners=("eager",), batch_sizes=(1,), timing=Timing(warmup_ms=1, samples=8))
MARKER = '{"bundle": 1, "litdeploy": "0.1.0"}'
# What a bundle's folder may lose or have rewritten, written from the list in storage/bundle.py's first lines.
LISTED = re.compile(
    r"\.litdeploy|manifest\.json|student\.safetensors|metrics\.jsonl|samples\.png"
    r"|transformers/[^/]+\.(json|txt|model|jinja|bpe|tiktoken)|tensorboard/events\.out\.tfevents\..*"
    r"|checkpoints/epoch-[^/]+-step-[^/]+\.safetensors|features/(key\.json|[^/]+\.bin)"
    r"|generations/[0-9][^/]*\.safetensors|export/(student\.[^/]+|\.partial-.*)"
    r"|profile/((report|teacher)\.[^/]+|samples\.json|\.partial-.*)|\.lock(\.json)?"
    r"|(.*/)?\.[^/]+\.\d+\.partial"
)
NAMES = (
    "notes.txt",
    "src/main.py",
    "manifest.json",
    "student.safetensors",
    "metrics.jsonl",
    "teacher.safetensors",
    "new.metrics.jsonl",
    "new.checkpoints/best.pt",
    "comparison.json",
    "recipe.yaml",
    "checkpoints/best.pt",
    "checkpoints/epoch-1-step-1.safetensors",
    "features/key.json",
    "features/mine/a.bin",
    "export/student.onnx",
    "export/notes.txt",
    "export/old/student.onnx",
    "profile/report.json",
    "profile/thesis.tex",
    "chain/8/notes.txt",
    "chain/8/.litdeploy",
    "generations/1.safetensors",
    "transformers/config.json",
    "transformers/weights.h5",
    "tensorboard/run/events.out.tfevents.1",
    ".lock",
    ".lock.json",
    ".new.safetensors.lock",
    ".new.safetensors.lock.json",
    ".thesis.tex.77.partial",
    "export/.thesis.tex.77.partial",
    "models/student-onnx/1/model.onnx",
)
LINK = object()
CONTENTS = ("years of work", "{}", MARKER, LINK)
Command = Callable[[Path, bool], object]


@pytest.fixture(scope="module")
def commands(teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    """Commands that write, on forty digits: each is given the tree and whether to overwrite."""
    place = tmp_path_factory.mktemp("given")
    data = place / "digits.safetensors"
    pack("digits", data, train_images=40, limit=40)
    run: dict[str, Any] = {**QUICK, "data": str(data), "student_depth": 8}
    new: dict[str, Any] = {"recipe": "digits-resnet-teacher", **QUICK, "data": str(data)}
    return {
        "compress": lambda tree, overwrite: compress(teacher_path, out=tree, overwrite=overwrite, **run),
        "resume": lambda tree, overwrite: compress(
            teacher_path, out=tree, overwrite=overwrite, resume=not overwrite, **run
        ),
        "deploy": lambda tree, overwrite: deploy(teacher_path, out=tree, overwrite=overwrite, target=TARGET, **run),
        "train": lambda tree, overwrite: train(
            "resnet8,width=4", out=tree / "new.safetensors", overwrite=overwrite, **new
        ),
        "pack": lambda tree, overwrite: pack(data, tree / "student.safetensors", overwrite=overwrite),
        "export": lambda tree, _: export(tree, target=TARGET, triton_repository=tree / "models"),
        "profile": lambda tree, _: profile(tree, target=TARGET),
        "compare": lambda tree, _: compare(
            teacher_path, out=tree, methods=("kd",), depths=(8,), seeds=1, train=False, data=str(data)
        ),
    }


@pytest.fixture(scope="module")
def made(commands: dict[str, Command], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that went the whole way."""
    out = tmp_path_factory.mktemp("made") / "deploy"
    commands["deploy"](out, False)
    return out


def grow(tree: Path, files: dict[str, Any], outside: Path) -> None:
    """Write the files, except those whose place another one has taken."""
    for name, content in files.items():
        path = tree / name
        with suppress(FileExistsError, NotADirectoryError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.is_file():
                path.unlink(missing_ok=True)
                if content is LINK:
                    path.symlink_to(outside)
                else:
                    path.write_text(content)


def contents(folder: Path) -> dict[str, bytes | Path]:
    """Path → content, or where a link points."""
    return {
        path.relative_to(folder).as_posix(): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def test_no_command_takes_a_file_that_is_not_ours(commands: dict[str, Command], made: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("years of work")

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        command=st.sampled_from(sorted(commands)),
        overwrite=st.booleans(),
        start=st.sampled_from(["nothing", "marker", "bundle"]),
        files=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(CONTENTS), max_size=4),
    )
    @example(command="train", overwrite=False, start="nothing", files={"new.metrics.jsonl": "years of work"})
    @example(command="train", overwrite=False, start="nothing", files={"new.metrics.jsonl": LINK})
    @example(command="train", overwrite=False, start="nothing", files={".new.safetensors.lock.json": "years of work"})
    @example(command="compress", overwrite=False, start="nothing", files={".lock.json": "years of work"})
    @example(command="compress", overwrite=False, start="nothing", files={".thesis.tex.77.partial": "years of work"})
    def check(command: str, overwrite: bool, start: str, files: dict[str, Any]) -> None:
        tree = tmp_path / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        if start == "bundle":
            shutil.copytree(made, tree)
        tree.mkdir(exist_ok=True)
        if start == "marker":
            (tree / ".litdeploy").write_text(MARKER)
        grow(tree, files, outside)
        before = contents(tree)
        ours = start != "nothing" or before.get(".litdeploy") == MARKER.encode()
        with suppress(LitdeployError):
            commands[command](tree, overwrite)
        after = contents(tree)
        taken = [name for name, content in before.items() if after.get(name) != content]
        assert outside.read_text() == "years of work"
        assert [name for name in taken if not (ours and LISTED.fullmatch(name))] == []

    check()
