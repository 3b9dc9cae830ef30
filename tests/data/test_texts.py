from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from litdeploy.batch import Batch
from litdeploy.config.recipe import DataSettings
from litdeploy.config.spec import ALPHABET, CharacterInput, InputSpec, NetworkSpec, TokenInput
from litdeploy.data import check_against, open_data, pack, prepared
from litdeploy.data.data import Data
from litdeploy.data.texts import LONGEST, NOTHING, Tokens
from litdeploy.errors import DataError

CPU = torch.device("cpu")
ROWS = [(f"{'A fine' if row % 2 else 'a poor'} film, no. {row}", ("bad", "good")[row % 2]) for row in range(40)]


def table(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def opened(path: Path, of: NetworkSpec | None = None, **settings: object) -> Data:
    return open_data(DataSettings.model_validate({"source": str(path), **settings}), CPU, 0, of)


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


transformers = pytest.importorskip("transformers")


TAKES = TokenInput(length=12, vocabulary=20)
TOKEN_ROWS = [("Good film", "b"), ("the plot was bad and the film was bad and the plot was poor", "a")] * 10


def spec(folder: Path, takes: TokenInput = TAKES) -> NetworkSpec:
    return NetworkSpec(name=f"hf:{folder}", input=takes)


def stored(path: Path, of: NetworkSpec, **settings: object) -> tuple[torch.Tensor, Batch]:
    [(found, _)] = opened(path, of, **settings).train.batches(100)
    return found, prepared(found, of.input)


def test_texts_become_what_the_tokeniser_makes_of_them(bert_folder: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "train.csv", TOKEN_ROWS)
    ids, batch = stored(path, spec(bert_folder), text_length=8)
    assert isinstance(batch, dict)
    assert (ids.dtype, ids.shape) == (torch.int16, (16, 8))
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_folder, local_files_only=True)
    # What transformers itself makes of the same texts, cut with the special tokens kept and padded behind.
    made = tokenizer([TOKEN_ROWS[0][0], TOKEN_ROWS[1][0]], truncation=True, padding="max_length", max_length=8)
    expected = {
        tuple(each) for each in zip(map(tuple, made["input_ids"]), map(tuple, made["attention_mask"]), strict=True)
    }
    found = {
        (tuple(row.tolist()), tuple(mask.tolist()))
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    assert found == expected
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_padding_token_in_a_text_is_one_of_its_tokens(bert_folder: Path) -> None:
    tokens = Tokens(DataSettings(text_length=6), spec(bert_folder))
    ids = torch.from_numpy(tokens(["[PAD] film", "film"]))
    assert ids.tolist() == [[2, 0, 9, 3, NOTHING, NOTHING], [2, 9, 3, NOTHING, NOTHING, NOTHING]]
    batch = prepared(ids, TokenInput(length=6, vocabulary=20, pad=7))
    assert isinstance(batch, dict)
    assert batch["input_ids"].tolist() == [[2, 0, 9, 3, 7, 7], [2, 9, 3, 7, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]


def test_a_large_vocabulary_is_stored_in_32_bits(bert_folder: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "train.csv", TOKEN_ROWS)
    small, _ = stored(path, spec(bert_folder))
    large, _ = stored(path, spec(bert_folder, TokenInput(length=12, vocabulary=2**15 + 1)))
    assert (small.dtype, large.dtype) == (torch.int16, torch.int32)
    assert torch.equal(small.int(), large)


def test_as_many_tokens_as_the_network_takes(bert_folder: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "train.csv", TOKEN_ROWS)
    assert opened(path, spec(bert_folder)).shape == (12,)
    fixed = TokenInput(length=12, vocabulary=20, fixed=True)
    assert opened(path, spec(bert_folder, fixed)).shape == (12,)
    for takes, length, message in (
        (TAKES, 13, "takes texts of up to 12 tokens. Say so: --text-length 12"),
        (fixed, 8, "takes texts of 12 tokens. Say so: --text-length 12"),
        (TAKES, 2, "2 tokens of its own to each text"),
    ):
        with pytest.raises(DataError, match=message):
            opened(path, spec(bert_folder, takes), text_length=length)


def test_resident_and_streamed_give_the_same_batches_of_tokens(bert_folder: Path, tmp_path: Path) -> None:
    path, order = table(tmp_path / "train.csv", TOKEN_ROWS), [torch.tensor([3, 0, 7]), torch.tensor([1])]
    resident, streamed = (opened(path, spec(bert_folder), resident=choice).train for choice in (True, False))
    for one, other in zip(resident.pick(order), streamed.pick(order), strict=True):
        assert torch.equal(one.images(), other.images())
        assert torch.equal(one.labels_N, other.labels_N)


def test_a_text_that_is_none_is_named(bert_folder: Path, tmp_path: Path) -> None:
    table(tmp_path / "train.csv", TOKEN_ROWS)
    table(tmp_path / "test.csv", [*TOKEN_ROWS[:3], ("  ", "a")])
    with pytest.raises(DataError, match=r"row 3 .* of split 'test' has no text"):
        opened(tmp_path, spec(bert_folder)).left_out()


def changed(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def test_the_record_knows_the_tokeniser(bert_folder: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "train.csv", TOKEN_ROWS)
    own = opened(path, spec(bert_folder))
    other = tmp_path / "other"
    shutil.copytree(bert_folder, other)
    changed(other, "tokenizer_config.json", lambda content: content.update(truncation_side="left"))
    from_left = opened(path, spec(bert_folder), tokenizer=str(other))
    assert own.tokens is not None
    assert from_left.tokens is not None
    # The same data, and other ids.
    assert own.record().fingerprint == from_left.record().fingerprint
    assert own.record().tokenizer != from_left.record().tokenizer
    assert own.tokens(["film the plot"]).tolist() != own.tokens(["film the"]).tolist()
    assert (
        from_left.tokens([TOKEN_ROWS[1][0]])[0, 1:11].tolist()
        == own.tokens([" ".join(TOKEN_ROWS[1][0].split()[-10:])])[0, 1:11].tolist()
    )
    # Using it, and writing it elsewhere, makes no other of it.
    own.tokens.save(tmp_path / "saved")
    again = opened(path, spec(bert_folder), tokenizer=str(tmp_path / "saved"))
    assert again.record() == own.record()


def without_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def code(folder: Path) -> None:
    without_vocabulary(folder)
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text("raise SystemExit('code of a folder was run')")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_vocabulary, "holds no tokenizer: its vocabulary has nothing but 5 special tokens"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "no tokenizer can be opened there"),
        (code, "no tokenizer can be opened there"),
        (
            lambda folder: changed(folder, "tokenizer_config.json", lambda content: content.pop("pad_token")),
            'has no token to pad with. .*"pad_token": "',
        ),
        (
            lambda folder: changed(folder, "tokenizer_config.json", lambda content: content.update(pad_token="[UNK]")),
            r"pads with id 1, and hf:\S+ with 0 \(pad_token_id in its config.json",
        ),
    ],
    ids=["without a vocabulary", "damaged", "code", "no padding", "another padding"],
)
def test_tokenisers_that_do_not_serve(
    bert_folder: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(bert_folder, folder)
    damage(folder)
    with pytest.raises(DataError, match=message):
        Tokens(DataSettings(), spec(folder))


def test_a_tokeniser_and_a_network_are_held_against_one_another(bert_folder: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "train.csv", TOKEN_ROWS)
    with pytest.raises(DataError, match=r"has ids up to 14, and hf:\S+ takes 0 to 9"):
        opened(path, spec(bert_folder, TokenInput(length=12, vocabulary=10)))
    with pytest.raises(DataError, match=r"no tokenizer for them is named.*--tokenizer FOLDER"):
        opened(path, NetworkSpec(name="own:network", input=TAKES))
    with pytest.raises(DataError, match=r"nowhere/there: no tokenizer can be opened there .* --tokenizer FOLDER"):
        opened(path, spec(bert_folder), tokenizer="nowhere/there")
    with pytest.raises(DataError, match=r"and no tokens\. Leave it out"):
        opened(path, NetworkSpec(name="vdcnn", input=CharacterInput()), tokenizer=str(bert_folder))
    check_against(opened(path, spec(bert_folder)), spec(bert_folder), 2)
    pack("digits", tmp_path / "digits.safetensors", limit=50)
    with pytest.raises(DataError, match="--text-length and --tokenizer out"):
        opened(tmp_path / "digits.safetensors", spec(bert_folder), tokenizer=str(bert_folder))


def test_tokens_that_a_tokeniser_does_not_have(bert_folder: Path, tmp_path: Path) -> None:
    def beyond(content: dict[str, Any]) -> None:
        content["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [99]

    folder = tmp_path / "bert"
    shutil.copytree(bert_folder, folder)
    changed(folder, "tokenizer.json", beyond)
    tokens = Tokens(DataSettings(), spec(folder))
    with pytest.raises(DataError, match=r"fails on a text \(it gives the id 99"):
        tokens(["a film"])
