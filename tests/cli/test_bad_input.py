"""Bad input gets a message, exit code 2, no traceback, and nothing half-written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.networks import Network, new
from litdeploy.networks.families.resnet import resnet
from litdeploy.networks.families.stargan import discriminator, stargan
from litdeploy.storage.bundle import Bundle
from tests.cli.conftest import Run

Make = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """Arguments after `compress`, what to make in the folder first, and what the message must say."""

    arguments: tuple[str, ...]
    message: str
    make: Callable[[Path], None] = lambda folder: None


class RunsCode:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("code-was-run"),))


def _save(content: object) -> Callable[[Path], None]:
    return lambda folder: torch.save(content, folder / "bad.pt")


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def _changed(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    """A ResNet-14's weights with some keys (`__` for a dot) replaced, or removed where None."""
    weights = resnet(14, width=4, in_channels=1).state_dict()
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    return _save(weights)


def _images(count: int, size: int, mode: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for label in range(count):
            for split in ("train", "test"):
                place = folder / "images" / split / f"class{label}"
                place.mkdir(parents=True)
                for index in range(8):
                    shape = (size, size) if mode == "L" else (size, size, 3)
                    pixels = np.full(shape, 20 * index, np.uint8)
                    Image.fromarray(pixels).save(place / f"{index}.png")

    return make


def _another_run(folder: Path) -> None:
    Bundle(folder / "deploy").claim(overwrite=False)
    (folder / "deploy" / "metrics.jsonl").write_text("an earlier run\n")


def _generator(*attributes: str, domains: int = 2) -> Callable[[Path], None]:
    """A generator of two domains for images of 16 pixels, a discriminator of three, images, a table of attributes."""

    def make(folder: Path) -> None:
        torch.save(stargan(blocks=2, domains=2, width=2).state_dict(), folder / "G.ckpt")
        torch.save(discriminator(3, 3, 2, 16).state_dict(), folder / "D.ckpt")
        _images(domains, 16, "RGB")(folder)
        second = range(8) if attributes[-1:] == ("Age",) else (0, 1) * 4
        more = ",0" * (len(attributes) - 2)
        rows = "".join(
            f"images/train/class0/{index}.png,{index % 2},{last}{more}\n" for index, last in enumerate(second)
        )
        (folder / "train.csv").write_text(f"file,{','.join(attributes)}\n{rows}" if attributes else "file\n")

    return make


DIGITS = ("--data", "digits", "--student-depth", "8")
DIGIT_ATTRIBUTES = tuple(f"is{digit}" for digit in range(10))
FACES = ("--input-shape", "3,16,16", "--data", "images", "--student-depth", "8", "--batch-size", "4")
TABLE = ("--input-shape", "3,16,16", "--data", "train.csv", "--image-column", "file", "--student-depth", "8")
CASES = {
    "missing file": Case(("absent.pt", *DIGITS), "no such file"),
    "empty file": Case(("bad.pt", *DIGITS), "is empty", _write("bad.pt", b"")),
    "not a checkpoint": Case(("bad.pt", *DIGITS), "not a checkpoint", _write("bad.pt", b"hello, world\n" * 50)),
    "truncated": Case(
        ("bad.safetensors", *DIGITS), "not a whole safetensors", _write("bad.safetensors", b"\x40" + bytes(40))
    ),
    "a pickle that runs code": Case(
        ("bad.pt", *DIGITS), "runs code when opened", _write("bad.pt", pickle.dumps(RunsCode()))
    ),
    "another network": Case(
        ("bad.pt", *DIGITS), "--network", _save({"weight": torch.zeros(3), "bias": torch.zeros(3)})
    ),
    "weights that are no numbers": Case(
        ("bad.pt", *DIGITS), "not finite numbers (bn1.bias)", _changed(bn1__bias=torch.tensor([0.0, torch.nan, 0, 0]))
    ),
    "the folder of a user who does not exist": Case(
        ("bad.pt", "--data", "~nosuchuser", "--student-depth", "8"), "~nosuchuser: no such file", _changed()
    ),
    "a seed that is too large": Case(("bad.pt", *DIGITS, "--seed", str(10**20)), "seed: input should be", _changed()),
    "a folder that no folder can be called": Case(
        ("TEACHER", *DIGITS, "--out", "a" * 300), "no file can have this name"
    ),
    "a missing key": Case(("bad.pt", *DIGITS), "missing: layer1.1.bn1.bias", _changed(layer1__1__bn1__bias=None)),
    "an extra key": Case(("bad.pt", *DIGITS), "unexpected: surplus", _changed(surplus=torch.zeros(1))),
    "another shape": Case(
        ("bad.pt", *DIGITS), "shape (5,) in the file, (4,) in the network", _changed(bn1__bias=torch.zeros(5))
    ),
    "other classes": Case(("TEACHER", "--data", "images", "--student-depth", "8"), "3 classes", _images(3, 8, "L")),
    "other channels": Case(("TEACHER", "--data", "images", "--student-depth", "8"), "channel", _images(10, 8, "RGB")),
    "another size": Case(("TEACHER", "--data", "images", "--student-depth", "8"), "--image-size", _images(10, 9, "L")),
    "no such data": Case(("TEACHER", "--data", "./nowhere", "--student-depth", "8"), "nowhere"),
    "an unknown key": Case(
        ("TEACHER", "--recipe", "my.yaml"),
        "my.yaml line 2: unknown key 'betta'",
        _write("my.yaml", b"seed: 0\nbetta: 1\n"),
    ),
    "a wrong type": Case(
        ("TEACHER", "--recipe", "my.yaml"), "my.yaml line 2: beta", _write("my.yaml", b"seed: 0\nbeta: much\n")
    ),
    "no such recipe": Case(("TEACHER", "--recipe", "nothing"), "digits-resnet"),
    "deeper than its teacher": Case(
        ("TEACHER", "--data", "digits", "--student-depth", "20"), "no deeper than its teacher"
    ),
    "a chain that grows": Case(("TEACHER", "--data", "digits", "--student-depth", "8,11"), "give --student-depth 11,8"),
    "a chain that stays": Case(("TEACHER", "--data", "digits", "--student-depth", "8,8"), "give --student-depth 8"),
    "a chain that begins with its teacher": Case(
        ("TEACHER", "--data", "digits", "--student-depth", "14,8"), "the teacher has depth 14"
    ),
    "a chain by an impossible depth": Case(
        ("TEACHER", "--data", "digits", "--student-depth", "11,8"), "--student-depth 11: no student of this teacher"
    ),
    "a chain that is none": Case(
        ("TEACHER", "--data", "digits", "--student-depth", "8,"), "--student-depth 8,: whole numbers of at least 1"
    ),
    "a chain in a recipe that grows": Case(
        ("TEACHER", "--recipe", "my.yaml"),
        "my.yaml line 2: student_depth: each student of a chain is shallower",
        _write("my.yaml", b"data: {source: digits}\nstudent_depth: [8, 11]\n"),
    ),
    "a chain of a method that keeps the depth": Case(
        ("TEACHER", "--data", "digits", "--student-depth", "11,8", "--method", "slimming"), "--method lit"
    ),
    "an impossible depth": Case(("TEACHER", "--data", "digits", "--student-depth", "9"), "Possible: 8, 14"),
    "no such section": Case(("TEACHER", "--data", "digits", "--student-blocks", "layer9=1"), "layer1 (2 blocks)"),
    "blocks that are no numbers": Case(("TEACHER", "--data", "digits", "--student-blocks", "layer1"), "layer1=3"),
    "another run": Case(("TEACHER", *DIGITS), "--overwrite", _another_run),
    "no such method": Case(("TEACHER", *DIGITS, "--method", "magic"), "'magic' is not one of"),
    "born again at another depth": Case(
        ("TEACHER", *DIGITS, "--method", "born-again"), "--student-depth 14, or choose another method: --method lit"
    ),
    "born again with fewer blocks": Case(
        ("TEACHER", "--data", "digits", "--student-blocks", "layer1=1", "--method", "born-again"), "keeps all"
    ),
    "more generations than epochs": Case(
        ("TEACHER", "--data", "digits", "--method", "born-again", "--epochs", "2"), "--epochs 3, or --generations 2"
    ),
    "another method's settings": Case(("TEACHER", *DIGITS, "--generations", "2"), "or give --method born-again"),
    "born again as a copy": Case(
        ("TEACHER", "--data", "digits", "--method", "born-again", "--init", "copy"), "copies no blocks"
    ),
    "no student named": Case(
        ("TEACHER", "--data", "digits", "--method", "indistill"), "--student-network resnet20,width=8"
    ),
    "a depth for a student of its own": Case(
        ("TEACHER", *DIGITS, "--method", "indistill", "--student-network", "resnet8,width=2"), "Leave it out"
    ),
    "a student that is wider": Case(
        ("TEACHER", "--data", "digits", "--method", "indistill", "--student-network", "resnet8,width=8"),
        "'layer1' of the student has outputs (8, 8, 8), and the teacher's 'layer1' (4, 8, 8)",
    ),
    "a student for other images": Case(
        ("TEACHER", "--data", "digits", "--method", "indistill", "--student-network", "resnet8,in_channels=3"),
        "does not take images of (1, 8, 8)",
    ),
    "a student of other classes": Case(
        ("TEACHER", "--data", "digits", "--method", "indistill", "--student-network", "resnet8,width=2,classes=5"),
        "has 5 classes, and",
    ),
    "a student of another method": Case(("TEACHER", *DIGITS, "--student-network", "resnet8"), "--method indistill"),
    "fewer epochs than sections": Case(
        (
            "TEACHER",
            "--data",
            "digits",
            "--method",
            "indistill",
            "--student-network",
            "resnet8,width=2",
            "--epochs",
            "3",
        ),
        "--epochs 4 or more",
    ),
    "slimmed at another depth": Case(("TEACHER", *DIGITS, "--method", "slimming"), "keeps the teacher's depth, 14"),
    "all channels removed": Case(
        ("TEACHER", "--data", "digits", "--method", "slimming", "--prune-ratio", "1"), "slimming.prune_ratio"
    ),
    "one epoch of slimming": Case(
        ("TEACHER", "--data", "digits", "--method", "slimming", "--epochs", "1"), "--epochs 2"
    ),
    "slimming's settings elsewhere": Case(("TEACHER", *DIGITS, "--sparsity", "0.1"), "or give --method slimming"),
    "no such normalization": Case(("TEACHER", *DIGITS, "--normalise", "imagnet"), "imagenet"),
    "a shape that is none": Case(("TEACHER", *DIGITS, "--input-shape", "8,8"), "is not of one"),
    "too large a batch": Case(("TEACHER", *DIGITS, "--batch-size", "9999"), "--batch-size"),
    "no data": Case(("TEACHER", "--student-depth", "8"), "--data"),
    "no depth": Case(("TEACHER", "--data", "digits"), "--student-depth"),
    "distilling a generator": Case(
        ("G.ckpt", *FACES, "--method", "kd"), "learns by logits of classes, and stargan makes images", _generator()
    ),
    **{
        f"{method} of a generator": Case(("G.ckpt", *FACES, "--method", method), "stargan makes images", _generator())
        for method in ("hint", "scratch", "indistill")
    },
    "born-again generators": Case(
        ("G.ckpt", *FACES[:4], "--batch-size", "4", "--method", "born-again"), "stargan makes images", _generator()
    ),
    "slimming of a generator": Case(
        ("G.ckpt", *FACES[:4], "--method", "slimming"), "Choose another method: --method lit", _generator()
    ),
    "images that a generator does not give back": Case(
        ("G.ckpt", "--input-shape", "3,18,18", *FACES[2:], "--beta", "0"), "3 × 16 × 16", _generator()
    ),
    "LIT with distillation on a generator": Case(("G.ckpt", *FACES), "--method lit --beta 0", _generator()),
    "a fine-tuning without a discriminator": Case(
        ("G.ckpt", *FACES, "--beta", "0"), "its phase 'finetune' learns by logits", _generator()
    ),
    "a discriminator of other domains": Case(
        ("G.ckpt", *FACES, "--beta", "0", "--discriminator", "D.ckpt"), "in 2 domains", _generator()
    ),
    "a discriminator of a classifier": Case(
        ("TEACHER", *DIGITS, "--discriminator", "absent"), "is for networks that make images"
    ),
    "a discriminator for another method": Case(
        ("TEACHER", *DIGITS, "--method", "kd", "--discriminator", "absent"), "is of method 'lit'"
    ),
    "another number of domains": Case(
        ("G.ckpt", "--input-shape", "3,16,16", "--data", "images", "--student-depth", "8", "--beta", "0"),
        "has 3 domains (class0, class1, class2), and stargan translates to 2",
        _generator(domains=3),
    ),
    "an attribute that the data lack": Case(
        ("G.ckpt", *TABLE, "--attributes", "Male,Yung", "--beta", "0"),
        "--attributes Young",
        _generator("Male", "Young"),
    ),
    "an attribute that is named twice": Case(
        ("G.ckpt", *TABLE, "--attributes", "Male,Male", "--beta", "0"), "is named twice", _generator("Male", "Age")
    ),
    "attributes and a label": Case(
        ("G.ckpt", *TABLE, "--attributes", "Male,Age", "--label-column", "Age", "--beta", "0"),
        "exclude one another",
        _generator("Male", "Age"),
    ),
    "attributes for a classifier": Case(
        ("TEACHER", *TABLE[2:], "--attributes", ",".join(DIGIT_ATTRIBUTES)),
        "Name their column: --label-column",
        _generator(*DIGIT_ATTRIBUTES),
    ),
    "attributes that are texts": Case(
        ("G.ckpt", *TABLE, "--attributes", "Male,file", "--beta", "0"),
        "string; an attribute is there or not",
        _generator("Male", "Age"),
    ),
    "a discriminator that is another network": Case(
        ("G.ckpt", *FACES, "--beta", "0", "--discriminator", "TEACHER"),
        "is no discriminator of images of 3 × 16 × 16",
        _generator(),
    ),
    "an attribute that is none": Case(
        ("G.ckpt", *TABLE, "--attributes", "Male,Age", "--beta", "0"), "is there or not", _generator("Male", "Age")
    ),
    "CUDA that is absent": Case(("TEACHER", *DIGITS, "--device", "cuda:99"), "cuda"),
    "a device that is none": Case(("TEACHER", *DIGITS, "--device", "abacus"), "abacus"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input_gets_a_message_and_leaves_nothing(run: Run, tmp_path: Path, teacher_path: Path, case: Case) -> None:
    case.make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    answer = run("compress", *(teacher_path if word == "TEACHER" else word for word in case.arguments))
    assert answer.code == 2, answer.err
    assert case.message in answer.err
    assert "Traceback" not in answer.err
    assert answer.out == ""
    assert {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"
    } == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "--onnx"), "litdeploy compress"),
        (("export",), "--onnx"),
        (("export", "--trt"), "litdeploy compress"),
        (("export", "--onnx", "--calibration-images", "0"), "--calibration-images"),
        (("verify",), "litdeploy compress"),
        (("evaluate", "absent.pt2", "--data", "digits"), "litdeploy export --aoti"),
        (("evaluate", "absent.onnx", "--data", "digits", "--retrieval"), "outputs logits only"),
        (("evaluate", "absent.pt", "--data", "digits", "--retrieval", "--split", "train"), "Leave --split"),
        (("profile",), "litdeploy compress"),
        (("profile", "--target", "moon"), "no such folder"),
        (("profile", "--pace", "fast"), "--pace 100/s"),
        (("profile", "--student-depth", "8"), "No such option: --student-depth"),
        (("predict", "absent.pt"), "--student-depth 8,14,20"),
        (("predict", "absent.pt", "--student-depth", "8,x"), "whole numbers of at least 1 are needed, as in 8,14,20"),
        (("predict", "absent.pt", "--student-depth", "8"), "no such file"),
        (("inspect", "absent.pt"), "no such file"),
        (("inspect", "absent.onnx"), "no such file"),
        (("inspect", "absent.pt2"), "no such file"),
        (("evaluate", "absent.pt", "--data", "digits"), "no such file"),
        (("train", "resnet9", "--data", "digits"), "6n+2"),
        (("train", "nonsense", "--data", "digits"), "no network 'nonsense'"),
        (("train", "stargan", "--data", "digits"), "litdeploy trains new weights of classifiers alone"),
        (("deploy", "absent.pt", "--data", "digits", "--student-depth", "8"), "no such file"),
    ],
)
def test_the_other_commands_too(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    answer = run(*arguments)
    assert answer.code == 2, answer.err
    assert message in answer.err
    assert "Traceback" not in answer.err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-8 for images of 8×8 pixels and ten classes."""
    path = tmp_path_factory.mktemp("exported") / "resnet8.onnx"
    network = new("resnet8,width=4", normalise="half", input_shape=(1, 8, 8), classes=10, seed=0)
    export_onnx(Network(network.module.eval(), network.spec, "resnet8"), path, None)
    return path


def _truncated(folder: Path, content: bytes) -> None:
    (folder / "model.onnx").write_bytes(content[: len(content) // 2])


def _of_other_shapes(folder: Path, content: bytes) -> None:
    (folder / "model.onnx").write_bytes(content)
    _images(10, 16, "L")(folder)


def _of_another_network(folder: Path, content: bytes) -> None:
    (folder / "model.onnx").write_bytes(content)
    _images(3, 8, "L")(folder)


def _of_another_channel(folder: Path, content: bytes) -> None:
    (folder / "model.onnx").write_bytes(content)
    _images(10, 8, "RGB")(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_truncated, "model.onnx: not an ONNX file"),
        (_of_other_shapes, "--image-size 8,8"),
        (_of_another_network, "has 3 classes"),
        (_of_another_channel, "takes 1 channel (gray)"),
    ],
)
def test_an_exported_file_that_is_torn_or_of_something_else(
    run: Run, tmp_path: Path, onnx_path: Path, make: Callable[[Path, bytes], None], message: str
) -> None:
    make(tmp_path, onnx_path.read_bytes())
    answer = run("evaluate", "model.onnx", "--data", tmp_path / "images" if make is not _truncated else "digits")
    assert answer.code == 2, answer.err
    assert message in answer.err
    assert "Traceback" not in answer.err


TEXTS = [f"fine number {row}" for row in range(24)]
LABELS = [row % 2 for row in range(24)]


def _texts(texts: list[str | bytes | None], labels: list[int | str], classes: int = 0, split: str = "train") -> Make:
    """Parquet with these rows first, then good ones; of a ClassLabel where `classes` says of how many."""

    def make(folder: Path) -> None:
        place = folder / "texts"
        place.mkdir()
        for name in {"train", "test", split}:
            mine = texts if name == split else []
            given = [cell if isinstance(cell, bytes) or cell is None else cell.encode() for cell in [*mine, *TEXTS]]
            pairs = {"text": pa.array(given, pa.binary()), "label": [*(labels if name == split else []), *LABELS]}
            table = pa.table(pairs)
            if classes:
                kind = {"names": [f"class{index}" for index in range(classes)], "_type": "ClassLabel"}
                features = {"text": {"dtype": "binary", "_type": "Value"}, "label": kind}
                table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
            parquet.write_table(table, place / f"{name}.parquet")

    return make


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (_texts([b"caf\xe9"], [0]), (), "row 0 (counted from 0) of split 'train' holds a text that is not UTF-8"),
        (_texts([None], [0]), (), "has no text in column 'text'. Remove the row"),
        # The test split is used once, after the training: it is checked before.
        (_texts(["fine", " \n"], [0, 1], split="test"), (), "row 1 (counted from 0) of split 'test' has no text"),
        (
            _texts(["long" * 2**18, "x" * (2**20 + 1)], [0, 1]),
            (),
            "row 1 (counted from 0) of split 'train' has a text of",
        ),
        (_texts(["fine"], [5], split="test"), (), "has the label '5', which no training row has"),
        (_texts(["fine"], [5]), (), "has 3 classes (0, 1, 5), and vdcnn has 2"),
        (_texts(["fine"], [9], classes=2), (), "has the label 9, and the file names 2 classes, from 0 to 1"),
        (_texts(["fine"], [-1], classes=2), (), "row 0 (counted from 0) of split 'train' has no label"),
        (_texts([], []), ("--student-depth", "9,17"), "give --student-depth 17,9"),
        (_texts([], []), ("--student-depth", "17,9"), "the teacher has depth 17"),
        (_texts([], []), ("--student-depth", "11"), "Possible: 9, 17"),
        (_texts([], []), ("--text-length", "32"), "--text-length 64"),
        (_texts([], []), ("--method", "slimming"), "--method slimming keeps the teacher's depth, 17"),
        (
            _texts([], []),
            ("--method", "indistill", "--student-network", "vdcnn9,width=1", "--student-depth", ""),
            "compares the channels of images, and",
        ),
    ],
)
def test_texts_that_a_student_cannot_learn_from(
    run: Run, tmp_path: Path, reader_path: Path, make: Make, arguments: tuple[str, ...], message: str
) -> None:
    make(tmp_path)
    given = {"--student-depth": "9", "--text-length": "64", "--batch-size": "8"}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    words = [word for pair in given.items() if pair[1] for word in pair]
    answer = run("compress", reader_path, "--data", "texts", "--epochs", "1", "--device", "cpu", *words)
    assert answer.code == 2, answer.err
    assert message in answer.err
    assert "Traceback" not in answer.err
    assert "validation" not in answer.err  # nothing was trained
    assert {path.name for path in tmp_path.iterdir()} <= {"texts", "deploy"}
    assert not [path for path in tmp_path.glob("deploy/*") if path.name != ".lock"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokenizer", "nowhere/there"), "nowhere/there: no tokenizer can be opened there"),
        (("--text-length", "13"), "takes texts of up to 12 tokens. Say so: --text-length 12"),
        (("--student-depth", "5"), "Possible: 1, 2, 3, 4"),
        (("--student-depth", "", "--method", "slimming"), "the scales of their batch norms, and the network has none"),
        (
            ("--student-depth", "", "--method", "indistill", "--student-network", "resnet8"),
            "takes tokens. Choose another",
        ),
        (("--normalise", "half"), "takes tokens, which are not normalized. Leave --normalise out"),
        (("--image-size", "8,8"), "Leave --image-… or --text-… out"),
    ],
)
def test_tokens_that_a_student_cannot_learn_from(
    run: Run, tmp_path: Path, bert_path: Path, reviews_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = {"--student-depth": "2", "--text-column": "text", "--batch-size": "8", "--epochs": "2"}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    words = [word for pair in given.items() if pair[1] for word in pair]
    answer = run("compress", bert_path, "--data", reviews_path, "--device", "cpu", *words)
    assert answer.code == 2, answer.err
    assert message in answer.err
    assert "validation" not in answer.err  # nothing was trained
    assert not [path for path in tmp_path.glob("deploy/*") if path.name != ".lock"]


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"text,label\ncaf\xe9,0\nfine,1\n", (), "Write it again in UTF-8"),
        (b"text,label\n" + b"fine,0\n ,1\n" * 40, (), "has no text in column 'text'"),
        (b"text,label\n" + b"fine,0\nbad,1\n" * 40, ("--text-length", "32"), "--text-length 64"),
        (b"text,label\n" + b"fine,0\nbad,0\n" * 40, (), "at least two classes are needed"),
        (b"text,label\n" + b"fine,0\nbad,1\n" * 40, ("--normalise", "half"), "Leave --normalise out"),
        (b"words,label\n" + b"fine,0\nbad,1\n" * 40, (), "--image-column words"),
    ],
)
def test_texts_that_do_not_serve(
    run: Run, tmp_path: Path, content: bytes, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "train.csv").write_bytes(content)
    answer = run("train", "vdcnn9,width=2,hidden=4", "--data", "train.csv", "--batch-size", "8", *arguments)
    assert answer.code == 2
    assert message in answer.err
    assert "Traceback" not in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["train.csv"]
