"""Data of tasks that need no download: docstrings, sums, and records as JSON."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from mlx_dora.demo.data import write_demo_data

_SIZES = {"train": 480, "valid": 48, "test": 96}
# fmt: off
_FIRST = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "June",
          "Kai", "Lena", "Max", "Nora", "Otto", "Pia"]
_TOWNS = ["Oslo", "Lima", "Cairo", "Delhi", "Quito", "Sofia", "Tunis", "Paris",
          "Turin", "Accra", "Perth", "Kyoto"]
_JOBS = ["baker", "nurse", "pilot", "tailor", "farmer", "lawyer", "welder", "singer",
         "miner", "editor"]
# fmt: on


def write_tasks(folder: Path) -> dict[str, Path]:
    """Write the data of each task as jsonl files, and return their folders by name."""
    folders = {"docstrings": folder / "docstrings"}
    write_demo_data(folders["docstrings"])
    for name, row in (("sums", _sum), ("records", _record)):
        folders[name] = folder / name
        _write(folders[name], row, name)
    return folders


def _write(
    folder: Path, row: Callable[[random.Random], tuple[str, str]], name: str
) -> None:
    """Write three files of different rows, the same on every run."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, seen = random.Random(name), set[str]()
    for split, count in _SIZES.items():
        lines: list[str] = []
        while len(lines) < count:
            question, answer = row(draw)
            if question in seen:
                continue
            seen.add(question)
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            lines.append(json.dumps({"messages": messages}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def _sum(draw: random.Random) -> tuple[str, str]:
    """A sum or difference of two numbers below 100."""
    first, second = draw.randrange(100), draw.randrange(100)
    if draw.random() < 0.5:
        return f"What is {first} + {second}?", f"The answer is {first + second}."
    return f"What is {first} - {second}?", f"The answer is {first - second}."


def _record(draw: random.Random) -> tuple[str, str]:
    """A sentence about a person, and its facts as JSON."""
    name, town = draw.choice(_FIRST), draw.choice(_TOWNS)
    job, age = draw.choice(_JOBS), draw.randrange(18, 80)
    facts = {"name": name, "age": age, "job": job, "town": town}
    text = draw.choice(
        (
            f"{name} is {age} years old and works as a {job} in {town}.",
            f"In {town} lives {name}, a {job} of {age}.",
            f"The {job} from {town} is called {name} and is {age}.",
        )
    )
    return f"Write as JSON: {text}", json.dumps(facts)
