from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from litdeploy.config.recipe import DataSettings
from litdeploy.config.spec import ALPHABET, CharacterInput, InputSpec, NetworkSpec
from litdeploy.data import check_against, open_data, pack, prepared
from litdeploy.data.data import Data
from litdeploy.data.texts import LONGEST
from litdeploy.errors import DataError

CPU = torch.device("cpu")
ROWS = [(f"{'A fine' if row % 2 else 'a poor'} film, no. {row}", ("bad", "good")[row % 2]) for row in range(40)]


def table(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def opened(path: Path, **settings: object) -> Data:
    return open_data(DataSettings.model_validate({"source": str(path), **settings}), CPU, 0)


def decoded(ids: torch.Tensor, alphabet: str = ALPHABET) -> str:
    return "".join(" ?"[number] if number < 2 else alphabet[number - 2] for number in ids.tolist())


def test_a_csv_file_of_texts(tmp_path: Path) -> None:
    data = opened(table(tmp_path / "reviews.csv", ROWS), text_length=16, validation=0.1)
    assert (data.classes, data.shape) == (("bad", "good"), (16,))
    counts = {split: len(getattr(data, split)) for split in ("train", "validation", "test")}
    assert counts == {"train": 32, "validation": 4, "test": 4}
    texts, labels = next(iter(data.train.batches(32)))
    assert (texts.shape, texts.dtype, labels.dtype) == ((32, 16), torch.uint8, torch.int64)
    for text, label in zip(texts, labels, strict=True):
        assert bytes(text).decode().rstrip("\0") in [row[0][:16] for row in ROWS if row[1] == data.classes[label]]
    assert data.record().images == counts


def test_resident_and_streamed_give_the_same_batches(tmp_path: Path) -> None:
    path = table(tmp_path / "train.csv", ROWS)
    order = [torch.tensor([3, 0, 7]), torch.tensor([1])]
    resident, streamed = (opened(path, text_length=16, resident=resident).train for resident in (True, False))
    for one, other in zip(resident.pick(order), streamed.pick(order), strict=True):
        assert torch.equal(one.images(), other.images())
        assert torch.equal(one.labels_N, other.labels_N)
    for one, other in zip(resident.batches(5), streamed.batches(5), strict=True):
        assert torch.equal(one[0], other[0])
    assert type(resident) is not type(streamed)


def test_characters_become_ids_on_the_device(tmp_path: Path) -> None:
    # A CSV file has no character 0; a Parquet file may.
    texts, path = ["Caf\u00e9 \U0001f600\0 {A}\n|", "x" * 30] * 4, tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": texts, "label": ["a", "b"] * 4}), path)
    data = opened(path, text_length=20)
    [picked] = data.train.pick([torch.arange(len(data.train))])
    ids = prepared(picked.images(), CharacterInput(length=20))
    assert isinstance(ids, torch.Tensor)
    assert ids.dtype == torch.int64
    # Small letters for capitals, one id for what is not in the alphabet, zeros behind the end.
    assert {decoded(row) for row in ids} == {"caf? ?? {a}?|".ljust(20), "x" * 20}
    assert (ids[[text.startswith("caf") for text in map(decoded, ids)]][:, 13:] == 0).all()


def test_capitals_that_an_alphabet_has_are_kept() -> None:
    spec = CharacterInput(length=3, alphabet="abAB")
    assert prepared(torch.tensor([[65, 98, 67]], dtype=torch.uint8), spec).tolist() == [[4, 3, 1]]
    assert CharacterInput().vocabulary == 69
    for wrong in ("aa", "\u00e9", ""):
        with pytest.raises(ValueError, match="alphabet"):
            CharacterInput(alphabet=wrong)


def test_columns_by_name(tmp_path: Path) -> None:
    path = table(tmp_path / "train.csv", ROWS, header=("body", "stars"))
    with pytest.raises(DataError, match="--text-column body"):
        opened(path, text_length=16)
    assert opened(path, text_column="body", label_column="stars").shape == (1014,)
    with pytest.raises(DataError, match="no column 'words'"):
        opened(path, text_column="words", label_column="stars")
    with pytest.raises(DataError, match="Leave --image-… or --text-… out"):
        opened(path, text_column="body", image_size=(8, 8))


def test_stars_are_classes_in_their_order(tmp_path: Path) -> None:
    rows = [(f"film {row}", ("10", "1", "7")[row % 3]) for row in range(30)]
    data = opened(table(tmp_path / "train.csv", rows, header=("text", "rating")), label_column="rating")
    assert data.classes == ("1", "7", "10")


def test_numbers_are_no_texts(tmp_path: Path) -> None:
    path = table(tmp_path / "train.csv", [(str(row), "ab"[row % 2]) for row in range(20)])
    with pytest.raises(DataError, match=r"holds int64, and texts are needed"):
        _ = opened(path).train


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"row 1 .* of split 'train' has no text in column 'text'"),
        (None, "has no text"),
        (" \n\t", "has no text"),
        (b"caf\xe9", r"row 1 .* is not UTF-8 \(unexpected end of data at byte 3\)"),
        ("x" * (LONGEST + 1), r"has a text of 1,048,577 characters, and 1,048,576 are the most"),
    ],
    ids=["empty", "missing", "blank", "not UTF-8", "overlong"],
)
@pytest.mark.parametrize("resident", [True, False])
def test_texts_that_are_none_are_named(tmp_path: Path, text: str | bytes | None, message: str, resident: bool) -> None:
    # As files are found that another program wrote: Arrow takes any bytes for a string.
    cells = [None if cell is None else cell if isinstance(cell, bytes) else cell.encode() for cell in ("fine", text)]
    strings = pa.array([*cells, b"good", b"bad"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": strings, "label": [0, 1, 0, 1]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), tmp_path / "test.parquet")
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), tmp_path / "validation.parquet")
    data = opened(tmp_path, resident=resident)
    with pytest.raises(DataError, match=message):
        list(data.train.batches(4))


def test_bytes_are_read_as_utf_8(tmp_path: Path) -> None:
    cells = pa.array([f"text {row}".encode() for row in range(8)])
    pq.write_table(pa.table({"text": cells, "label": [0, 1] * 4}), tmp_path / "train.parquet")
    texts, _ = next(iter(opened(tmp_path / "train.parquet", text_length=8).train.batches(1)))
    assert bytes(texts[0]).startswith(b"text ")


def test_a_csv_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(b"text,label\ncaf\xe9,a\nfine,b\n")
    with pytest.raises(DataError, match="Write it again in UTF-8"):
        opened(path)


def test_a_label_outside_the_classes_is_named(tmp_path: Path) -> None:
    table(tmp_path / "train.csv", ROWS)
    table(tmp_path / "test.csv", [("fine", "good"), ("so so", "middling")])
    with pytest.raises(DataError, match=r"row 1 .* of split 'test' has the label 'middling'"):
        _ = opened(tmp_path).test


def test_texts_and_networks_are_held_against_one_another(tmp_path: Path) -> None:
    data = opened(table(tmp_path / "train.csv", ROWS), text_length=80)
    images = InputSpec(shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    check_against(data, NetworkSpec(name="vdcnn", input=CharacterInput(length=80)), 2)
    for wanted, message in (
        (CharacterInput(length=1014), "--text-length 1014"),
        (images, "takes images"),
    ):
        with pytest.raises(DataError, match=message):
            check_against(data, NetworkSpec(name="any", input=wanted), 2)
    digits = open_data(DataSettings(source="digits"), CPU, 0)
    with pytest.raises(DataError, match="takes texts"):
        check_against(digits, NetworkSpec(name="vdcnn", input=CharacterInput()), 10)


def test_texts_are_not_packed(tmp_path: Path) -> None:
    path = table(tmp_path / "train.csv", ROWS)
    with pytest.raises(DataError, match="images are packed"):
        pack(path, tmp_path / "out.safetensors")
    pack("digits", tmp_path / "digits.safetensors", limit=50)
    with pytest.raises(DataError, match="--text-length and --tokenizer out"):
        opened(tmp_path / "digits.safetensors", text_length=8)
