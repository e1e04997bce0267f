"""Damage to files: bits, JSON values, tensors and their headers, YAML."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

TITLE = "\x1b]0;TITLE\x07\x1b[2J"
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**63, -(2**64),
    10**30, 10**400, float("nan"), float("inf"), "", "x", "1", "²", "true", "..", "~",
    "/", "../../x", "a/b", TITLE, "<img src=x onerror=alert(1)>", "\ud800", "\0", "(",
    "*q_proj", "x" * 70_000, [], {}, [[]], [None], ["x"], [1, "x"], {"x": 1}, {"": []},
]  # fmt: skip
NAMES = ["", ".", "x", TITLE, "a.b.c", "\ud800", "x" * 70_000, "__metadata__", "²"]
DTYPES = [
    "F32", "F16", "BF16", "I32", "U32", "F64", "I8", "U8", "BOOL", "C64", "F8_E4M3",
    "F8_E5M2", "F4", "X",
]  # fmt: skip
YAML_TEXTS = [
    "a: 2020-99-99\n", "? [a, b]\n: c\n", "a: &a [*a]\n", "!!python/name:os.system x\n",
    "a: !!bool maybe\n", "- x\n", "---\n---\n", "a: " + "[" * 2000, "\t\n", "{", "%",
    "a: " + "9" * 5000 + "\n", "a: !!timestamp x\n", "<<: 5\n", "a: 0x" + "f" * 5000,
]  # fmt: skip
FLOATS = [float("nan"), float("inf"), -float("inf"), 3e38, 1e-40, 0.0, -1.0]

Dice = random.Random


def mutate_file(path: Path, dice: Dice) -> str:
    """Damage a file in a way that suits its kind; says how."""
    special: dict[str, Callable[[bytes, Dice], tuple[str, bytes]]] = {
        ".json": _json,
        ".jsonl": _jsonl,
        ".safetensors": _tensors,
        ".yaml": _yaml,
    }
    change = special.get(path.suffix, _bytes)
    if dice.random() < 0.2:
        change = _bytes
    content = path.read_bytes()
    try:
        what, new = change(content, dice)
    except Exception:
        what, new = _bytes(content, dice)  # damaged before: no longer of its kind
    path.write_bytes(new)
    return f"{path.name}: {what}"


def _bytes(content: bytes, dice: Dice) -> tuple[str, bytes]:
    data, size = bytearray(content), len(content)
    kind = dice.choice(["flip", "cut", "zero", "insert", "empty", "bom", "double"])
    at = dice.randrange(size) if size else 0
    if kind == "flip" and size:
        for _ in range(dice.choice([1, 1, 8])):
            data[dice.randrange(size)] ^= 1 << dice.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "zero":
        end = min(size, at + dice.choice([1, 16, 512]))
        data[at:end] = bytes(end - at)
    elif kind == "insert":
        data[at:at] = dice.randbytes(dice.choice([1, 8, 64]))
    elif kind == "empty":
        data = bytearray()
    elif kind == "bom":
        data[:0] = b"\xef\xbb\xbf"
    else:
        data *= 2
    return kind, bytes(data)


def _places(node: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    keys: Any = ()
    if isinstance(node, dict):
        keys = list(node)
    elif isinstance(node, list):
        keys = range(len(node))
    for key in keys:
        found.append((node, key))
        _places(node[key], found)
    return found


def mutate_value(root: Any, dice: Dice) -> tuple[str, Any]:
    """Change one place of a JSON-like value."""
    places = _places(root, [])
    kind = dice.choice(["replace"] * 5 + ["delete", "rename", "swap", "root"])
    if not places or kind == "root":
        value = dice.choice(VALUES)
        return f"root is {value!r:.40}", value
    node, key = dice.choice(places)
    if kind == "delete":
        del node[key]
    elif kind == "rename" and isinstance(node, dict):
        new = dice.choice([*NAMES, *map(str, node)])
        node[new] = node.pop(key)
        return f"{key!r:.40} renamed to {new!r:.40}", root
    elif kind == "swap":
        other, where = dice.choice(places)
        if where in other if isinstance(other, dict) else where < len(other):
            node[key] = json.loads(json.dumps(other[where]))
        return f"{key!r:.40} becomes {where!r:.40}", root
    else:
        value = json.loads(json.dumps(dice.choice(VALUES)))
        node[key] = value
        return f"{key!r:.40} becomes {value!r:.40}", root
    return f"{key!r:.40} {kind}", root


def _json(content: bytes, dice: Dice) -> tuple[str, bytes]:
    if dice.random() < 0.05:
        deep = dice.choice([200, 100_000])
        return f"nested {deep} deep", b"[" * deep + b"]" * deep
    what, value = mutate_value(json.loads(content), dice)
    return what, json.dumps(value).encode()


def _jsonl(content: bytes, dice: Dice) -> tuple[str, bytes]:
    lines = content.splitlines()
    at = dice.randrange(len(lines))
    what, lines[at] = (_json if dice.random() < 0.8 else _bytes)(lines[at], dice)
    return f"line {at + 1}: {what}", b"\n".join(lines) + b"\n"


def _yaml(content: bytes, dice: Dice) -> tuple[str, bytes]:
    if dice.random() < 0.2:
        text = dice.choice(YAML_TEXTS)
        before = content if dice.random() < 0.5 else b""
        return f"{text!r:.40} added", before + text.encode()
    what, value = mutate_value(yaml.safe_load(content), dice)
    if dice.random() < 0.5:
        return what, json.dumps(value).encode()
    return what, yaml.safe_dump(value).encode("utf-8", "surrogatepass")


def _tensors(content: bytes, dice: Dice) -> tuple[str, bytes]:
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    names = [name for name in header if name != "__metadata__"]
    name = dice.choice(names)
    entry = header[name]
    kind = dice.choice(
        ["value", "value", "value", "dtype", "shape", "rename", "drop", "json", "size"]
    )
    what = f"{kind} of {name}"
    if kind == "value":
        start, end = entry["data_offsets"]
        value = dice.choice(FLOATS)
        what += f" {value}"
        count = (
            (end - start) // 4 if dice.random() < 0.3 else min(1, (end - start) // 4)
        )
        data[start : start + 4 * count] = struct.pack(f"<{count}f", *[value] * count)
    elif kind == "dtype":
        entry["dtype"] = dice.choice(DTYPES)
        _resize(header, name, data, dice)
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = dice.choice(
            [shape[::-1], [*shape, 1], [1, *shape], shape[:-1], [0], [2**40, 2**40]]
        )
        _resize(header, name, data, dice)
    elif kind == "rename":
        new = dice.choice([*NAMES, f"{name}.x", name.rpartition(".")[0] or "y"])
        header = {new if key == name else key: header[key] for key in header}
    elif kind == "drop":
        del header[name]
        if dice.random() < 0.8:
            _cut(header, data, *entry["data_offsets"])
    elif kind == "json":
        what, header = mutate_value(header, dice)
    text = json.dumps(header).encode()
    claimed = len(text)
    if kind == "size":
        claimed = dice.choice([0, 2**63, 10**8 + 1, claimed - 1, claimed + 1])
    return what, struct.pack("<Q", claimed) + text + bytes(data)


def _cut(header: dict[str, Any], data: bytearray, start: int, end: int) -> None:
    """Take bytes out and move the tensors behind them."""
    del data[start:end]
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [o - (end - start) for o in entry["data_offsets"]]


def _resize(header: dict[str, Any], name: str, data: bytearray, dice: Dice) -> None:
    """Give a tensor the bytes that its header now claims, most of the time."""
    entry = header[name]
    bits = {"F64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16,
            "BF16": 16, "F4": 4}.get(entry["dtype"], 8)  # fmt: skip
    size = bits
    for one in entry["shape"]:
        size *= one
    size //= 8
    if dice.random() < 0.1 or size > 1_000_000:
        return
    start, end = entry["data_offsets"]
    grown = size - (end - start)
    data[start:end] = dice.randbytes(size)
    entry["data_offsets"] = [start, start + size]
    for other, one in header.items():
        if other not in ("__metadata__", name) and one["data_offsets"][0] >= end:
            one["data_offsets"] = [offset + grown for offset in one["data_offsets"]]
