from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from litdeploy.config.recipe import DataSettings
from litdeploy.data import Data, open_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds, or leaves, anything in the user's own cache of `datasets`."""
    import datasets

    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """A random image: the same for the same number."""

    def make(number: int, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> Image.Image:
        random = np.random.default_rng(number)
        height, width = size
        pixels = random.integers(0, 256, (height, width) if mode == "L" else (height, width, len(mode)), np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture
def encoded(picture: Callable[..., Image.Image]) -> Callable[..., bytes]:
    """The same as the bytes of a PNG file."""

    def make(number: int, **how: Any) -> bytes:
        buffer = io.BytesIO()
        picture(number, **how).save(buffer, "png")
        return buffer.getvalue()

    return make


@pytest.fixture
def parquet(encoded: Callable[..., bytes]) -> Callable[..., Path]:
    """Writes a Parquet file as the hub has them: `img` with encoded images, `label` with named classes."""
    import datasets

    def write(path: Path, labels: list[int], names: tuple[str, ...] = ("cat", "dog"), first: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
        images = [{"bytes": encoded(first + number), "path": f"{number}.png"} for number in range(len(labels))]
        datasets.Dataset.from_dict({"img": images, "label": labels}, features=features).to_parquet(path)
        return path

    datasets.disable_progress_bars()
    return write


@pytest.fixture
def opened() -> Callable[..., Data]:
    """`open_data` on the CPU."""

    def call(source: str | Path | None, seed: int = 0, **settings: Any) -> Data:
        name = None if source is None else str(source)
        return open_data(DataSettings(source=name, **settings), torch.device("cpu"), seed)

    return call
