from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from litdeploy.data import Data
from litdeploy.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A test split of these images: PIL images are saved as PNG, bytes and None (no file) as they are."""

    def make(*images: Image.Image | bytes | None, name: str = "test.csv") -> Path:
        lines = ["file,label"]
        for number, image in enumerate(images):
            lines.append(f"pictures/{number}.png,{number % 2}")
            file = tmp_path / "pictures" / f"{number}.png"
            file.parent.mkdir(exist_ok=True)
            if isinstance(image, Image.Image):
                image.save(file)
            elif image is not None:
                file.write_bytes(image)
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return tmp_path

    return make


def pixels(data: Data) -> torch.Tensor:
    return torch.cat([images for images, _ in data.test.batches(2)])


def chw(image: Image.Image) -> torch.Tensor:
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


Folder = Callable[..., Path]
Opened = Callable[..., Data]
Picture = Callable[..., Image.Image]


def test_pixels_are_exact(folder: Folder, opened: Opened, picture: Picture) -> None:
    originals = [picture(number) for number in range(5)]
    data = opened(folder(*originals))
    assert data.shape == (3, 8, 6)
    assert torch.equal(pixels(data), torch.stack([chw(image) for image in originals]))


def test_grey_images_stay_of_one_channel(folder: Folder, opened: Opened, picture: Picture) -> None:
    originals = [picture(number, mode="L") for number in range(3)]
    black_and_white = Image.fromarray(np.eye(8, 6, dtype=np.uint8) * 255).convert("1")
    data = opened(folder(*originals, black_and_white))
    assert data.shape == (1, 8, 6)
    expected = torch.stack([chw(image) for image in [*originals, black_and_white.convert("L")]])
    assert torch.equal(pixels(data), expected)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_among_colour_images_others_become_rgb(folder: Folder, opened: Opened, picture: Picture, mode: str) -> None:
    other = picture(1, mode=mode)
    assert torch.equal(pixels(opened(folder(picture(0), other)))[1], chw(other.convert("RGB")))


def test_a_colour_image_among_grey_ones_is_refused(folder: Folder, opened: Opened, picture: Picture) -> None:
    data = opened(folder(picture(0, mode="L"), picture(1)))
    with pytest.raises(DataError, match=r"row 1 .*split 'test', pictures/1\.png: a color image \(mode RGB\)"):
        pixels(data)


def test_sixteen_bits_are_refused(folder: Folder, opened: Opened, picture: Picture) -> None:
    deep = Image.fromarray(np.full((8, 6), 40_000, np.uint16))
    with pytest.raises(DataError, match=r"row 1 .*more than 8 bits a channel"):
        pixels(opened(folder(picture(0, mode="L"), deep)))
    with pytest.raises(DataError, match="more than 8 bits"):
        _ = opened(folder(deep, deep)).shape


def test_another_size_is_refused_and_the_message_says_how_to_resize(
    folder: Folder, opened: Opened, picture: Picture
) -> None:
    data = opened(folder(picture(0), picture(1, size=(9, 7))))
    with pytest.raises(DataError, match=r"1\.png: 9 × 7 .* has 8 × 6\. Resize them all: --image-size 8,6"):
        pixels(data)


def test_image_size_resizes_with_antialiasing(folder: Folder, opened: Opened, picture: Picture) -> None:
    images = [picture(0, size=(40, 20)), picture(1, size=(8, 30))]
    data = opened(folder(*images), image_size=(4, 5))
    assert data.shape == (3, 4, 5)
    reference = [
        torch.nn.functional.interpolate(chw(image)[None].float(), (4, 5), mode="bilinear", antialias=True)
        for image in images
    ]
    # Pillow rounds between its two directions.
    torch.testing.assert_close(pixels(data).float(), torch.cat(reference), rtol=0, atol=1.01)


@pytest.mark.parametrize("size", [(0, 5), (4, -1)])
def test_an_image_size_of_nothing_is_refused(opened: Opened, size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="--image-size"):
        opened("digits", image_size=size)


def test_a_missing_image_is_named_with_row_and_path(folder: Folder, opened: Opened, picture: Picture) -> None:
    data = opened(folder(picture(0), picture(1), None))
    with pytest.raises(DataError, match=r"row 2 .*pictures/2\.png: cannot be read \(No such file.*relative to /"):
        pixels(data)


def test_absolute_paths_serve(tmp_path: Path, opened: Opened, picture: Picture) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    for number in range(2):
        picture(number).save(tmp_path / "elsewhere" / f"{number}.png")
    lines = "".join(f"{tmp_path}/elsewhere/{number}.png,{number}\n" for number in range(2))
    (tmp_path / "here" / "test.csv").write_text("path,label\n" + lines)
    assert torch.equal(pixels(opened(tmp_path / "here"))[1], chw(picture(1)))


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_image_is_named(folder: Folder, opened: Opened, picture: Picture, content: bytes) -> None:
    with pytest.raises(DataError, match=r"row 1 .*pictures/1\.png: cannot be decoded as an image"):
        pixels(opened(folder(picture(0), content)))


def test_the_orientation_that_a_camera_noted_is_applied(folder: Folder, opened: Opened, picture: Picture) -> None:
    lying = picture(0, size=(6, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise to be looked at
    buffer = io.BytesIO()
    lying.save(buffer, "png", exif=exif)
    data = opened(folder(buffer.getvalue(), picture(1)))
    assert data.shape == (3, 8, 6)
    assert torch.equal(pixels(data)[0], chw(lying.transpose(Image.Transpose.ROTATE_270)))


def test_a_row_without_an_image_is_named(tmp_path: Path, opened: Opened, encoded: Callable[..., Any]) -> None:
    import datasets

    cells = [{"bytes": encoded(0), "path": None}, None]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict({"image": cells, "label": [0, 1]}, features=features)
    dataset.to_parquet(tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"row 1 .* has no image"):
        pixels(opened(tmp_path))


def _claimed(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is so large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8193, 8193), (50_000, 50_000), (2**31 - 1, 2**31 - 1)])
def test_an_image_of_more_pixels_than_any_is_not_decoded(
    folder: Folder, opened: Opened, picture: Picture, size: tuple[int, int]
) -> None:
    with pytest.raises(DataError, match=r"row 1 .*cannot be decoded.*pixels"):
        pixels(opened(folder(picture(0), _claimed(*size), picture(2))))


def test_formats_that_start_other_programs_are_no_images(folder: Folder, opened: Opened, picture: Picture) -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(DataError, match="cannot be decoded"):
        pixels(opened(folder(picture(0), postscript)))


@pytest.mark.parametrize(
    ("path", "message"), [("/dev/zero", "not a regular file"), ("pipe", "regular"), ("a" * 300, "long")]
)
def test_a_path_that_is_no_file_is_not_waited_for(
    folder: Folder, opened: Opened, picture: Picture, path: str, message: str
) -> None:
    made = folder(picture(0), picture(1))
    os.mkfifo(made / "pipe")
    with (made / "test.csv").open("a") as file:
        file.write(f"{path},0\n")
    with pytest.raises(DataError, match=message):
        pixels(opened(made))
