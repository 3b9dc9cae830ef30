from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litdeploy.config.recipe import DataSettings
from litdeploy.config.spec import CharacterInput, NetworkSpec, TokenInput
from litdeploy.data import check_against, open_data, pack, prepared
from litdeploy.data.data import Data
from litdeploy.data.tokens import NOTHING, Tokens
from litdeploy.errors import DataError
from litdeploy.networks.batch import Batch

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
TAKES = TokenInput(length=12, vocabulary=20)
ROWS = [("Good film", "b"), ("the plot was bad and the film was bad and the plot was poor", "a")] * 10


def table(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def spec(folder: Path, takes: TokenInput = TAKES) -> NetworkSpec:
    return NetworkSpec(name=f"hf:{folder}", input=takes)


def opened(path: Path, of: NetworkSpec, **settings: object) -> Data:
    return open_data(DataSettings.model_validate({"source": str(path), **settings}), CPU, 0, of)


def stored(path: Path, of: NetworkSpec, **settings: object) -> tuple[torch.Tensor, Batch]:
    [(found, _)] = opened(path, of, **settings).train.batches(100)
    return found, prepared(found, of.input)


def test_texts_become_what_the_tokeniser_makes_of_them(bert_folder: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "train.csv", ROWS)
    ids, batch = stored(path, spec(bert_folder), text_length=8)
    assert isinstance(batch, dict)
    assert (ids.dtype, ids.shape) == (torch.int16, (16, 8))
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_folder, local_files_only=True)
    # What transformers itself makes of the same texts, cut with the special tokens kept and padded behind.
    made = tokenizer([ROWS[0][0], ROWS[1][0]], truncation=True, padding="max_length", max_length=8)
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
    path = table(tmp_path / "train.csv", ROWS)
    small, _ = stored(path, spec(bert_folder))
    large, _ = stored(path, spec(bert_folder, TokenInput(length=12, vocabulary=2**15 + 1)))
    assert (small.dtype, large.dtype) == (torch.int16, torch.int32)
    assert torch.equal(small.int(), large)


def test_as_many_tokens_as_the_network_takes(bert_folder: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "train.csv", ROWS)
    assert opened(path, spec(bert_folder)).shape == (12,)
    fixed = TokenInput(length=12, vocabulary=20, fixed=True)
    assert opened(path, spec(bert_folder, fixed)).shape == (12,)
    for takes, length, message in (
        (TAKES, 13, "takes texts of up to 12 tokens. Say so: --text-length 12"),
        (fixed, 8, "takes texts of 12 tokens. Say so: --text-length 12"),
        (TAKES, 2, "2 tokens of its own round each text"),
    ):
        with pytest.raises(DataError, match=message):
            opened(path, spec(bert_folder, takes), text_length=length)


def test_resident_and_streamed_give_the_same_batches(bert_folder: Path, tmp_path: Path) -> None:
    path, order = table(tmp_path / "train.csv", ROWS), [torch.tensor([3, 0, 7]), torch.tensor([1])]
    resident, streamed = (opened(path, spec(bert_folder), resident=choice).train for choice in (True, False))
    for one, other in zip(resident.pick(order), streamed.pick(order), strict=True):
        assert torch.equal(one.images(), other.images())
        assert torch.equal(one.labels_N, other.labels_N)


def test_a_text_that_is_none_is_named(bert_folder: Path, tmp_path: Path) -> None:
    table(tmp_path / "train.csv", ROWS)
    table(tmp_path / "test.csv", [*ROWS[:3], ("  ", "a")])
    with pytest.raises(DataError, match=r"row 3 .* of split 'test' has no text"):
        opened(tmp_path, spec(bert_folder)).left_out()


def changed(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def test_the_record_knows_the_tokeniser(bert_folder: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "train.csv", ROWS)
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
        from_left.tokens([ROWS[1][0]])[0, 1:11].tolist()
        == own.tokens([" ".join(ROWS[1][0].split()[-10:])])[0, 1:11].tolist()
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
        (without_vocabulary, "holds no tokeniser: its vocabulary has nothing but 5 special tokens"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "no tokeniser can be opened there"),
        (code, "no tokeniser can be opened there"),
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
    path = table(tmp_path / "train.csv", ROWS)
    with pytest.raises(DataError, match=r"has ids up to 14, and hf:\S+ takes 0 to 9"):
        opened(path, spec(bert_folder, TokenInput(length=12, vocabulary=10)))
    with pytest.raises(DataError, match=r"nothing says which tokeniser .* --tokenizer FOLDER"):
        opened(path, NetworkSpec(name="own:network", input=TAKES))
    with pytest.raises(DataError, match=r"nowhere/there: no tokeniser can be opened there .* --tokenizer FOLDER"):
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
