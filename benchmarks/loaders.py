"""Every kind of file that litdeploy opens: a valid one, and what opens it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.mutations import CANARY_MODULE, mutate
from litdeploy.config.recipe import DataSettings, read_recipe
from litdeploy.config.spec import NetworkSpec, TokenInput
from litdeploy.config.target import Target, Timing, read_target
from litdeploy.data import open_data
from litdeploy.data.data import open_store
from litdeploy.data.pack import pack
from litdeploy.data.texts import Tokens
from litdeploy.evaluation.evaluate import evaluate
from litdeploy.exporter import export
from litdeploy.exporter.formats.onnx import export_onnx
from litdeploy.exporter.teacher import load_exported, load_teacher
from litdeploy.files import sha256_of
from litdeploy.inspection import inspect
from litdeploy.networks import Network, load, new
from litdeploy.networks.embedder import Embedding, write_modules
from litdeploy.networks.width import narrow
from litdeploy.profiler.profile import profile
from litdeploy.profiler.report.output import read_training, write_report
from litdeploy.profiler.report.page import render
from litdeploy.profiler.schema import read_report
from litdeploy.runtime.engine import read_engine
from litdeploy.runtime.inductor import built_for, package_details
from litdeploy.storage.bundle import Bundle, sidecar_of
from litdeploy.storage.checkpoint import write_checkpoint
from litdeploy.storage.exports import ExportFolder
from litdeploy.storage.records import Artefact
from litdeploy.trainer import compress
from litdeploy.trainer.objectives.adversarial import load_discriminator
from litdeploy.trainer.teacher import read_teacher as start_teacher

_CPU = torch.device("cpu")
_BUNDLE = "LITDEPLOY_FUZZ_BUNDLE"
_TINY = "resnet8,width=4"


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        make: writes valid files into a folder.
        victims: names of those of them that are mutated.
        load: opens what is in the folder, in each way that litdeploy does.
    """

    make: Callable[[Path], None]
    victims: tuple[str, ...]
    load: Callable[[Path], object]


def _network() -> Network:
    return new(_TINY, normalise="half", input_shape=(1, 8, 8), classes=3, seed=0)


def _zip(folder: Path) -> None:
    torch.save({"epoch": 3, "state_dict": _network().module.state_dict()}, folder / "a.pt")


def _old(folder: Path) -> None:
    torch.save(_network().module.half().state_dict(), folder / "a.th", _use_new_zipfile_serialization=False)


def _safetensors(folder: Path) -> None:
    made = _network()
    write_checkpoint(folder / "a.safetensors", made.module.state_dict(), made.spec.with_(classes=("a", "b", "c")))


def _slimmed(folder: Path) -> None:
    made = _network()
    widths = {"layer1.0.conv1": (2, 4, 3, 3), "layer1.0.bn1": (2,), "layer1.0.conv2": (4, 2, 3, 3)}
    narrow(made.module, widths)
    write_checkpoint(folder / "a.safetensors", made.module.state_dict(), made.spec.with_(widths=widths))


def _open_weights(folder: Path) -> None:
    [path] = folder.iterdir()
    inspect(path, normalise="half")


def _generator(folder: Path) -> None:
    """With its discriminator; both by the published names too."""
    for name, network in _published().items():
        write_checkpoint(folder / f"{name}.safetensors", network.module.state_dict(), network.spec)
        torch.save(network.module.state_dict(), folder / f"{name}.ckpt")


@cache
def _published() -> dict[str, Network]:
    shape = (1, 8, 8)
    generator = "stargan,blocks=2,width=2,in_channels=1"
    discriminator = "stargan-discriminator,layers=2,width=2,image_size=8,in_channels=1"
    return {
        "G": new(generator, normalise="half", input_shape=shape, classes=3, seed=0),
        "D": new(discriminator, normalise="half", input_shape=shape, classes=3, seed=0),
    }


def _open_generator(folder: Path) -> None:
    for name in ("G.safetensors", "G.ckpt"):
        inspect(folder / name, input_shape=(1, 8, 8))
    for name in ("D.safetensors", "D.ckpt"):
        load_discriminator(str(folder / name), _published()["G"])


def _pixels(number: int) -> Any:
    return np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)


_ENDINGS = ("png", "jpg", "gif", "webp", "tif", "bmp", "ppm")


def _images(folder: Path) -> None:
    for number, ending in enumerate(_ENDINGS):
        path = folder / "train" / f"class{number % 2}" / f"{number}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_pixels(number)).save(path)


def _csv(folder: Path) -> None:
    (folder / "images").mkdir()
    for number in range(12):
        Image.fromarray(_pixels(number)).save(folder / "images" / f"{number}.png")
    rows = "".join(f"images/{number}.png,{'ab'[number % 2]}\n" for number in range(12))
    (folder / "train.csv").write_text("file_name,label\n" + rows)


def _parquet(folder: Path) -> None:
    import datasets

    _csv(folder)
    cells = [{"bytes": (folder / "images" / f"{number}.png").read_bytes(), "path": None} for number in range(12)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"image": cells, "label": [0, 1] * 6}, features).to_parquet(folder / "train.parquet")
    (folder / "train.csv").unlink()


def _decode(source: Path) -> None:
    store = open_store(DataSettings(source=str(source), image_size=(8, 8)))
    for split in store.splits:
        store.stored(split, np.arange(len(store.labels(split))), _CPU)


def _texts(folder: Path) -> None:
    (folder / "train.txt").write_text("".join(f"text {number}\n" for number in range(12)))


def _json_lines(folder: Path) -> None:
    rows = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_texts(source: Path) -> None:
    store = open_store(DataSettings(source=str(source)))
    store.stored("train", np.arange(len(store.labels("train"))), _CPU)


def _packed(folder: Path) -> None:
    (folder / "source").mkdir()
    _csv(folder / "source")
    pack(folder / "source", folder / "a.safetensors")


def _open_packed(folder: Path) -> None:
    data = open_data(DataSettings(source=str(folder / "a.safetensors"), resident=False), _CPU, 0)
    for _ in data.train.batches(2):
        pass


def _recipe(folder: Path) -> None:
    (folder / "a.yaml").write_bytes((Path(__file__).parents[1] / "recipes" / "cifar10-resnet.yaml").read_bytes())
    _safetensors(folder)


def _open_recipe(folder: Path) -> None:
    read_recipe(f"{folder / 'a.yaml'}:paper")
    start_teacher(folder / "a.safetensors", read_recipe(folder / "a.yaml"), None)


def _target(folder: Path) -> None:
    (folder / "a.yaml").write_bytes((Path(__file__).parents[1] / "profiles" / "h200.yaml").read_bytes())


def _onnx(folder: Path) -> None:
    export_onnx(_network(), folder / "a.onnx", None)


def _open_onnx(folder: Path) -> None:
    inspect(folder / "a.onnx")
    evaluate(folder / "a.onnx", data={"source": str(_few_images()), "image_size": [8, 8]}, split="train")


@cache
def _few_images() -> Path:
    """Grey images in three classes."""
    folder = Path(mkdtemp(prefix="litdeploy-fuzz-"))
    for number in range(15):
        path = folder / "train" / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_pixels(number)[:, :, 0]).save(path)
    return folder


def _package(folder: Path) -> None:
    """Of a package only what vouches for it: what is in it runs once that is right."""
    (folder / "a.pt2").write_bytes(b"not code, " * 100)
    metadata = {"mean": "[0.5]", "std": "[0.5]", "precision": "fp32", "classes": '["a", "b", "c"]'}
    details = {"metadata": metadata, "image_shape": [1, 8, 8], "classes": 3, "built_for": built_for(_CPU)}
    _vouch(folder / "a.pt2", {**details, "command": "litdeploy export --aoti", "bytes": 1000})


def _engine(folder: Path) -> None:
    (folder / "a.engine").write_bytes(b"not code, " * 100)
    shapes = {"input": "images", "output": "logits", "input_shape": ["batch", 1, 8, 8], "output_shape": ["batch", 3]}
    kinds = {"input_type": "float32", "output_type": "float32", "library": "tensorrt_rtx", "gpu": None}
    other = {"compute_capabilities": ["8.6"], "version_compatible": False, "hardware_compatibility": "none"}
    rest = {"batches": {"min": 1, "opt": 8, "max": 64}, "metadata": {}, "onnx_sha256": "0" * 64, "command": "litdeploy"}
    last = {"precisions": {"source": "network", "layers": {}, "weights": {}}, "bytes": 1000}
    limits = {"memory_limit": None, "timing_cache": None}
    _vouch(folder / "a.engine", {**shapes, **kinds, **other, **rest, **last, **limits})


def _vouch(path: Path, details: dict[str, Any]) -> None:
    versions = {"torch": str(torch.__version__), "tensorrt_rtx": "1.7.1.116"}
    artefact = Artefact(
        path=path.name,
        sha256=sha256_of(path),
        precision="fp32",
        versions=versions,
        details=json.loads(json.dumps(details)),
    )
    sidecar_of(path).write_text(artefact.model_dump_json(indent=2))


def _open_engine(folder: Path) -> None:
    engine = read_engine(folder / "a.engine")
    engine.check("1.7.1.116", "8.6")


def real_bundle() -> Path:
    """A bundle as the three verbs leave it; processes that are started find it by the environment."""
    if _BUNDLE in os.environ:
        return Path(os.environ[_BUNDLE])
    folder = Path(mkdtemp(prefix="litdeploy-fuzz-"))
    source = new("resnet14,width=4", normalise="half", input_shape=(1, 8, 8), classes=10, seed=3)
    teacher = folder / "teacher.safetensors"
    write_checkpoint(teacher, source.module.state_dict(), source.spec)
    out = folder / "deploy"
    compress(teacher, data="digits", student_depth=8, epochs=1, out=out, device="cpu", compile="off", precision="fp32")
    target = Target(
        device="cpu", runners=("eager", "onnxruntime"), batch_sizes=(1, 8), timing=Timing(samples=8, max_seconds=1)
    )
    export(out, target=target)
    profile(out, target=target)
    os.environ[_BUNDLE] = str(out)
    return out


@cache
def _real_generator() -> Path:
    """A bundle of a generator's student, profiled."""
    folder = Path(mkdtemp(prefix="litdeploy-fuzz-"))
    _generator(folder)
    out = folder / "deploy"
    compress(
        folder / "G.safetensors",
        data={"source": str(_few_images()), "image_size": (8, 8)},
        student_blocks={"blocks": 1},
        discriminator=str(folder / "D.safetensors"),
        main={"epochs": 1, "learning_rate": 0.01},
        finetune={"epochs": 1, "learning_rate": 1e-4},
        beta=0.0,
        batch_size=4,
        precision="fp32",
        compile="off",
        device="cpu",
        out=out,
    )
    target = Target(device="cpu", runners=("eager",), batch_sizes=(1,), timing=Timing(samples=8, max_seconds=1))
    profile(out, target=target)
    return out


def _generator_bundle(folder: Path) -> None:
    (folder / "profile").mkdir()
    for name in ("manifest.json", "student.safetensors", "samples.png", "profile/report.json"):
        (folder / name).write_bytes((_real_generator() / name).read_bytes())


def _open_generator_bundle(folder: Path) -> None:
    if report := read_report(folder / "profile"):
        write_report(report, (), folder / "profile")
        _check_page((folder / "profile" / "report.html").read_text(encoding="utf-8"))
    _open_bundle(folder)


def _bundle(folder: Path) -> None:
    real = real_bundle()
    for name in ("manifest.json", "student.safetensors", "metrics.jsonl"):
        (folder / name).write_bytes((real / name).read_bytes())
    for name in ("export/student.onnx", "export/student.onnx.json"):
        (folder / "export").mkdir(exist_ok=True)
        (folder / name).write_bytes((real / name).read_bytes())


def _open_bundle(folder: Path) -> None:
    bundle = Bundle(folder)
    manifest = bundle.read_complete()
    for artefact in manifest.artefacts.values():
        bundle.artefact_path(artefact)
        artefact.opset()
    load(bundle.student_path)
    load_teacher(bundle, manifest, None, None)


def _exports(folder: Path) -> None:
    """A network exported uncompressed: made anew, since its manifest has its folder's path."""
    source = new("resnet8,width=4", normalise="half", input_shape=(1, 8, 8), classes=10, seed=3)
    export(source, out=folder, target=Target(device="cpu", batch_sizes=(1,)))


def _open_exports(folder: Path) -> None:
    exports = ExportFolder(folder)
    for artefact in exports.read().artefacts.values():
        exports.artefact_path(artefact)
    load_exported(exports, exports.weights_path, None)


def _tokeniser(folder: Path) -> None:
    import tokenizers
    import transformers

    words: Any = tokenizers.models.WordPiece({"[PAD]": 0, "[UNK]": 1, "a": 2, "good": 3, "film": 4}, unk_token="[UNK]")  # noqa: S106 (no password)
    pieces: Any = tokenizers.Tokenizer(words)
    pieces.normalizer = tokenizers.normalizers.BertNormalizer()
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]")  # noqa: S106
    made.save_pretrained(folder)
    transformers.BertConfig().save_pretrained(folder)


def _open_tokeniser(folder: Path) -> None:
    spec = NetworkSpec(name=f"hf:{folder}", input=TokenInput(length=8, vocabulary=5))
    ids = Tokens(DataSettings(), spec)(["A good film", "no film at all, " * 9])
    assert ids.max() < 5, "an id that the network does not take"


def _embedder(folder: Path) -> None:
    import transformers

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=5, max_position_embeddings=8, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    write_modules(Embedding(normalize=True), 8, 8, folder)


def _metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").write_bytes((real_bundle() / "metrics.jsonl").read_bytes())


def _open_metrics(folder: Path) -> None:
    report = read_report(real_bundle() / "profile")
    assert report is not None
    changed = report.model_copy(update={"training": read_training(folder / "metrics.jsonl")})
    _check_page(render(changed))


def _report(folder: Path) -> None:
    (folder / "report.json").write_bytes((real_bundle() / "profile" / "report.json").read_bytes())


def _open_report(folder: Path) -> None:
    if report := read_report(folder):
        _check_page(render(report))


def _check_page(page: str) -> None:
    page.encode()
    assert "<script" not in page, "the page holds a script"


def canary_module(folder: Path) -> None:
    """Writes the module that no file may cause to be imported."""
    (folder / f"{CANARY_MODULE}.py").write_text("import pathlib\npathlib.Path('canary').touch()\nbuild = print\n")


KINDS: dict[str, Kind] = {
    "checkpoint": Kind(_zip, ("a.pt",), _open_weights),
    "checkpoint, old format": Kind(_old, ("a.th",), _open_weights),
    "safetensors": Kind(_safetensors, ("a.safetensors",), _open_weights),
    "safetensors of a slimmed student": Kind(_slimmed, ("a.safetensors",), _open_weights),
    "generator": Kind(_generator, ("G.safetensors", "G.ckpt", "D.safetensors", "D.ckpt"), _open_generator),
    "packed dataset": Kind(_packed, ("a.safetensors",), _open_packed),
    "images": Kind(
        _images, tuple(f"train/class{number % 2}/{number}.{ending}" for number, ending in enumerate(_ENDINGS)), _decode
    ),
    "csv": Kind(_csv, ("train.csv",), _decode),
    "parquet": Kind(_parquet, ("train.parquet",), _decode),
    "texts": Kind(_texts, ("train.txt",), _read_texts),
    "json lines": Kind(_json_lines, ("train.jsonl",), _read_texts),
    "recipe": Kind(_recipe, ("a.yaml",), _open_recipe),
    "target": Kind(_target, ("a.yaml",), lambda folder: read_target(folder / "a.yaml")),
    "onnx": Kind(_onnx, ("a.onnx",), _open_onnx),
    "package": Kind(_package, ("a.pt2", "a.pt2.json"), lambda folder: package_details(folder / "a.pt2", _CPU)),
    "engine": Kind(_engine, ("a.engine", "a.engine.json"), _open_engine),
    "bundle": Kind(_bundle, ("manifest.json", "student.safetensors", "export/student.onnx"), _open_bundle),
    "bundle of a generator": Kind(
        _generator_bundle,
        ("manifest.json", "student.safetensors", "samples.png", "profile/report.json"),
        _open_generator_bundle,
    ),
    "exports": Kind(_exports, ("exports.json", "network.safetensors", "network.onnx"), _open_exports),
    "tokeniser": Kind(_tokeniser, ("tokenizer.json", "tokenizer_config.json", "config.json"), _open_tokeniser),
    "sentence embedder": Kind(
        _embedder, ("config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"), load
    ),
    "metrics": Kind(_metrics, ("metrics.jsonl",), _open_metrics),
    "report": Kind(_report, ("report.json",), _open_report),
}


def draw(kind: Kind, files: dict[str, bytes], random: Random) -> dict[str, bytes]:
    """The kind's files with one of them mutated; now and then another file takes its place."""
    victim = random.choice(kind.victims)
    other = files[random.choice(kind.victims)]
    return {**files, victim: mutate(random, files[victim], other, victim)}
