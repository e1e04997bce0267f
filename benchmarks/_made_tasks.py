"""Data of tasks that need no download: docstrings, sums, records as JSON, sorting."""

import json
import random
from collections.abc import Callable, Mapping
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


Row = tuple[str, str]
"""Question and answer."""


def write_tasks(folder: Path) -> dict[str, Path]:
    """Write the data of each task as jsonl files, and return their folders by name."""
    folders = {"docstrings": folder / "docstrings"}
    write_demo_data(folders["docstrings"])
    made = {"sums": sum_row, "records": record_row, "sorting": sorting_row}
    for name, draw_row in made.items():
        folders[name] = folder / name
        folders[name].mkdir(parents=True, exist_ok=True)
        for split, rows in distinct_rows(draw_row, name, _SIZES).items():
            text = "".join(map(chat_line, rows))
            (folders[name] / f"{split}.jsonl").write_text(text)
    return folders


def distinct_rows(
    draw_row: Callable[[random.Random], Row], name: str, sizes: Mapping[str, int]
) -> dict[str, list[Row]]:
    """Draw rows of each split, all different, and the same on every run."""
    draw, seen = random.Random(name), set[str]()
    splits: dict[str, list[Row]] = {}
    for split, count in sizes.items():
        splits[split] = []
        while len(splits[split]) < count:
            row = draw_row(draw)
            if row[0] not in seen:
                seen.add(row[0])
                splits[split].append(row)
    return splits


def chat_line(row: Row) -> str:
    """Return a row as a line in chat format."""
    roles = zip(("user", "assistant"), row, strict=True)
    messages = [{"role": role, "content": content} for role, content in roles]
    return json.dumps({"messages": messages}) + "\n"


def sum_row(draw: random.Random) -> Row:
    """A sum or difference of two numbers below 100."""
    first, second = draw.randrange(100), draw.randrange(100)
    if draw.random() < 0.5:
        return f"What is {first} + {second}?", f"The answer is {first + second}."
    return f"What is {first} - {second}?", f"The answer is {first - second}."


def record_row(draw: random.Random) -> Row:
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


def sorting_row(draw: random.Random) -> Row:
    """Five numbers below 100, and the same in order."""
    numbers = draw.sample(range(100), 5)
    answer = ", ".join(map(str, sorted(numbers)))
    return f"Sort: {', '.join(map(str, numbers))}", f"{answer}."
