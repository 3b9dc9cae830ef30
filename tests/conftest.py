"""Fixtures that several tests share."""

from __future__ import annotations

import csv
import functools
import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from litdeploy.networks import new
from litdeploy.storage.checkpoint import write_checkpoint

if TYPE_CHECKING:
    from litdeploy.storage.bundle import Bundle

SHARED = Path(__file__).parents[2] / "shared"

# Of what AOTInductor writes around its kernels, for this process and those that it starts: it is called a few times
# here, and compiling it takes longer than all calls.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
    # Files that take long come first. xdist gives files out in this order: one that began last would keep one process
    # busy when the other has nothing left.
    long = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in long)


def pytest_runtest_setup() -> None:
    """torch reads its table of ONNX operators anew for each export, which takes a second, and changes nothing in it:
    once it is imported, one is kept."""
    exporter = sys.modules.get("torch.onnx._internal.exporter._registration")
    registry = getattr(exporter, "ONNXRegistry", None)
    if registry is not None and not isinstance(vars(registry)["from_torchlib"], staticmethod):
        registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and teachers, which is not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"real data and teachers are not at {SHARED}")
    return SHARED


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded by a test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="session")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained ResNet-14 of width 4 for scikit-learn's digits."""
    made = new("resnet14,width=4", normalise="half", input_shape=(1, 8, 8), classes=10, seed=3)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    write_checkpoint(path, made.module.state_dict(), made.spec.with_(classes=tuple("0123456789")))
    return path


WORDS = ("good", "fine", "bad", "poor", "film", "plot", "the", "a", "was", "and")


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers has it: the configuration of a BERT of four blocks for up to 32 tokens, and a tokeniser
    of few words. Nothing is written into it."""
    tokenizers, transformers = (pytest.importorskip(name) for name in ("tokenizers", "transformers"))
    folder = tmp_path_factory.mktemp("bert")
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = {word: number for number, word in enumerate((*special, *WORDS))}
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    pieces.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    named = {f"{name.strip('[]').lower()}_token": name for name in special}
    transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, **named).save_pretrained(folder)
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 4}
    transformers.BertConfig(vocab_size=20, max_position_embeddings=32, **small).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV file of 160 texts of 2 to 14 of these words, in each one of the first four, and the class that it tells."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row in range(160):
            words = [draw.choice(WORDS[4:]) for _ in range(draw.randint(1, 13))]
            words.insert(draw.randint(0, len(words)), draw.choice(WORDS[:2] if row % 2 else WORDS[2:4]))
            writer.writerow([" ".join(words), ("worse", "better")[row % 2]])
    return path


@pytest.fixture(scope="session")
def bert_path(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of that BERT, untrained, for texts of up to 12 tokens and these two classes."""
    made = new(f"hf:{bert_folder}", normalise=None, classes=2, seed=0).within(12)
    path = tmp_path_factory.mktemp("bert-weights") / "teacher.safetensors"
    write_checkpoint(path, made.module.state_dict(), made.spec.with_(classes=("better", "worse")))
    return path


@pytest.fixture(scope="session")
def generator_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained StarGAN of three blocks and three domains, `G.ckpt`, its discriminator, `D.ckpt`, and
    images in `domains/`."""
    from litdeploy.networks.families.stargan import discriminator, stargan

    folder = tmp_path_factory.mktemp("generator")
    draw = np.random.RandomState(0)
    for domain in ("blue", "green", "red"):
        for split, count in (("train", 12), ("test", 5)):
            place = folder / "domains" / split / domain
            place.mkdir(parents=True)
            for index in range(count):
                pixels = draw.randint(0, 255, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    torch.manual_seed(0)
    torch.save(stargan(blocks=3, domains=3, width=2).state_dict(), folder / "G.ckpt")
    torch.save(discriminator(layers=3, domains=3, width=2, image_size=16).state_dict(), folder / "D.ckpt")
    return folder


@pytest.fixture(scope="session")
def generator_bundle(generator_files: Path) -> Bundle:
    """The StarGAN made one of two blocks: by LIT, then against its discriminator."""
    from litdeploy.trainer import compress

    folder = generator_files
    return compress(
        folder / "G.ckpt",
        data=folder / "domains",
        discriminator=str(folder / "D.ckpt"),
        input_shape=(3, 16, 16),
        student_blocks={"blocks": 2},
        main={"epochs": 3, "learning_rate": 0.1},
        finetune={"epochs": 1, "learning_rate": 1e-4},
        optimiser="adamw",
        betas=(0.5, 0.999),
        beta=0,
        batch_size=8,
        out=folder / "deploy",
    )
