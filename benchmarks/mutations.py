"""Mutations of valid files: what a torn copy, a faulty disk and somebody with a purpose make of them."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

# Imported or called, it leaves a file: nothing that is loaded may bring that about.
CANARY_MODULE = "litdeploy_canary"
CANARY_FILE = "canary"
_NUMBERS = (-1, 0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 10**12, 10**18)
_TEXTS = (
    *("", "\0", "../../../etc/passwd", "/dev/zero", "/etc/passwd", "~", "a" * 300, "\x1b]0;x\x07", "\u202e", "ß漢"),
    *(f"{CANARY_MODULE}:build", f"timm:{CANARY_MODULE}", f"hf:{CANARY_MODULE}", f"!!python/name:{CANARY_MODULE}.build"),
    *("resnet,depth=1000000", "layer1", "__class__", '"><script>', "{{7*7}}", "$(touch canary)", "fp16", "cuda"),
)


class Canary:
    """A pickle of it runs code where pickles may."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(CANARY_FILE),))


def mutate(random: Random, content: bytes, other: bytes, name: str) -> bytes:
    """A mutation of a file, by one to three steps.

    Args:
        content: of a valid file.
        other: another file of the same kind, to splice with.
        name: of the file, by whose ending it is taken apart.
    """
    special = _SPECIAL.get(Path(name).suffix, ())
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if special and random.random() < 0.5:
            content = random.choice(special)(random, content)
        else:
            content = random.choice(_PLAIN)(random, content, other)
    return content


def _flip(random: Random, content: bytes, other: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice((1, 2, 8, 64)) if changed else 0):
        changed[_place(random, changed)] ^= 1 << random.randrange(8)
    return bytes(changed)


def _place(random: Random, content: Sequence[int]) -> int:
    """Anywhere, and often near the start or the end, where formats tell what lies between."""
    width = random.choice((64, 1024, len(content)))
    near = random.randrange(min(width, len(content)))
    return near if random.random() < 0.5 else len(content) - 1 - near


def _truncate(random: Random, content: bytes, other: bytes) -> bytes:
    cut = random.randrange(len(content) + 1)
    return content[:cut] if random.random() < 0.8 else content[cut:]


def _splice(random: Random, content: bytes, other: bytes) -> bytes:
    start, end = sorted(random.randrange(len(other) + 1) for _ in range(2))
    place = random.randrange(len(content) + 1)
    over = random.choice((0, end - start))
    return content[:place] + other[start:end] + content[place + over :]


def _swap(random: Random, content: bytes, other: bytes) -> bytes:
    a, b, c, d = sorted(random.randrange(len(content) + 1) for _ in range(4))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def _inflate(random: Random, content: bytes, other: bytes) -> bytes:
    """A large number over what lies somewhere: in binary, or in place of digits."""
    number: int = random.choice(_NUMBERS)
    digits = list(re.finditer(rb"\d+", content[:65536]))
    if digits and random.random() < 0.3:
        found = random.choice(digits)
        return content[: found.start()] + str(number).encode() + content[found.end() :]
    if not content:
        return content
    place, width = _place(random, content), random.choice((2, 4, 8))
    order: Any = random.choice(("little", "big"))
    return content[:place] + (number % (1 << 8 * width)).to_bytes(width, order) + content[place + width :]


_PLAIN: tuple[Callable[[Random, bytes, bytes], bytes], ...] = (_flip, _truncate, _splice, _swap, _inflate)


def _archive(random: Random, content: bytes) -> bytes:
    """A zip archive made again with one entry changed, removed, renamed, packed, or made a pickle with a purpose."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = {info.filename: archive.read(info) for info in archive.infolist()}
    except Exception:  # an earlier step left no archive
        return content
    if not entries:
        return content
    buffer, packing = io.BytesIO(), random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    name = random.choice([*(each for each in entries if each.endswith(".pkl")), *entries])
    what = random.randrange(6)
    if what == 0:
        entries[name] = pickle.dumps({"state_dict": Canary()}, protocol=2)
    elif what == 1:
        del entries[name]
    elif what == 2:
        entries[random.choice(("../../canary", "/canary", "x/constants.pkl", name + "\0"))] = entries.pop(name)
    elif what == 3:
        entries[name] = bytes(2**24)
    else:
        entries[name] = random.choice(_PLAIN)(random, entries[name], content)
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for each, value in entries.items():
            archive.writestr(each, value)
    return buffer.getvalue()


def _evil_pickle(random: Random, content: bytes) -> bytes:
    evil = pickle.dumps(Canary(), protocol=2)
    return random.choice((evil, content + evil, evil + content, content[: len(content) // 2] + evil[2:]))


def _json(random: Random, content: bytes) -> bytes:
    """One value of a JSON document in place of another."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return content
    places = list(_places(document))
    if not places:
        return content
    holder, key = random.choice(places)
    old = holder[key]
    deep = "[" * 2000 + "]" * 2000
    what = random.randrange(7)
    if what == 0:
        del holder[key]
    elif what == 6:
        return json.dumps(document).replace(json.dumps(old), deep, 1).encode()
    else:
        odd: Sequence[Any] = (None, True, [], {}, 1e308, float("nan"), float("inf"), 10**400, [old] * 3)
        choices: tuple[Sequence[Any], ...] = (_NUMBERS, _TEXTS, odd)
        holder[key] = random.choice(random.choice(choices))
    return json.dumps(document).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


def _lines(random: Random, content: bytes) -> bytes:
    """As `_json`, in one line of many."""
    lines = content.splitlines() or [b"{}"]
    place = random.randrange(len(lines))
    lines[place] = _json(random, lines[place])
    return b"\n".join(lines)


def _header(random: Random, content: bytes) -> bytes:
    """The header of a safetensors file changed as JSON, with the length that it has now."""
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    try:
        document = json.loads(header)
        inner = document.get("__metadata__", {})
        key = random.choice([*inner, None])
        if key is None:
            header = _json(random, header)
        else:
            inner[key] = _json(random, inner[key].encode()).decode()
            header = json.dumps(document).encode()
    except Exception:  # an earlier step left no header
        return content
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _yaml(random: Random, content: bytes) -> bytes:
    """A line more, or a value in place of another."""
    lines = content.decode("utf-8", errors="replace").splitlines() or [""]
    bomb = "a: &a [x,x,x,x,x,x,x,x]\n" + "\n".join(
        f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    added = (
        f"network: {CANARY_MODULE}:build",
        f"seed: !!python/object/apply:{CANARY_MODULE}.build []",
        "seed: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [canary]]",
        bomb,
        "x: " + "[" * 3000,
        "x: &x [*x]",
        "seed: " + "9" * 5000,
        "seed: 2026-99-99",
        "? [a, b]\n: c",
        "seed: !!binary aGk=",
    )
    place = random.randrange(len(lines))
    if random.random() < 0.5:
        lines.insert(place, random.choice(added))
    else:
        key = lines[place].partition(":")[0]
        lines[place] = f"{key}: {random.choice((*_NUMBERS, *_TEXTS, '[]', '{}', '.nan', '~'))}"
    return "\n".join(lines).encode("utf-8", errors="replace")


def _cells(random: Random, content: bytes) -> bytes:
    """A cell of a CSV file in place of another."""
    lines = content.decode("utf-8", errors="replace").splitlines() or [""]
    place = random.randrange(len(lines))
    cells = lines[place].split(",")
    cells[random.randrange(len(cells))] = str(random.choice((*_NUMBERS, *_TEXTS, '"', "a,b", "x" * 100_000)))
    lines[place] = ",".join(cells)
    return "\n".join(lines).encode("utf-8", errors="replace")


_SPECIAL: dict[str, tuple[Callable[[Random, bytes], bytes], ...]] = {
    ".pt": (_archive, _evil_pickle),
    ".th": (_evil_pickle,),
    ".safetensors": (_header,),
    ".json": (_json,),
    ".jsonl": (_lines,),
    ".yaml": (_yaml,),
    ".csv": (_cells,),
}
