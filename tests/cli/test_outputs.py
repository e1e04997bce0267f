"""No command writes over, around or into its inputs."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_dora.cli._group import group
from tests.cli.material import make_material


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("given") / "material")


@dataclass(frozen=True)
class Command:
    """A command that writes a folder; words in `words` that start with @ are inputs."""

    words: str
    output: str = "--save-path"
    overwrites: bool = True
    in_place: tuple[str, ...] = ()
    """Inputs whose own folder the command continues, unless it overwrites."""

    @property
    def inputs(self) -> list[str]:
        return [word[1:] for word in self.words.split() if word[0] == "@"]

    def line(self, material: Path, output: Path | str, overwrite: bool) -> list[str]:
        words = [
            str(material / word[1:]) if word[0] == "@" else word
            for word in self.words.split()
        ]
        named = [self.output, str(output)] if self.output else [str(output)]
        return [*words, *named, *(["--overwrite"] if overwrite else [])]


FOLDERS = {
    "train": Command(
        "train --model @m0 --data @data --resume-adapter-file @a1 --iters 1 --rank 4",
        output="--adapter-path",
        in_place=("a1",),
    ),
    "train from a file": Command(
        "train --model @m0 --data @data --iters 1 --rank 4 "
        "--resume-adapter-file @a1/adapters.safetensors",
        output="--adapter-path",
    ),
    "fuse": Command("fuse --model @m0 --adapter-path @a1"),
    "convert to peft": Command("convert @a1 --to peft --model @m0", output=""),
    "convert to mlx": Command("convert @peft --to mlx", output=""),
    "extract": Command("extract @m0 @m1 --rank 2"),
    "merge adapters": Command(
        "merge adapters @a1 @a2 --model @m0 --rank 2 --logit-error @data"
    ),
    "merge adapters by fisher": Command(
        "merge adapters @a1 @a2 --method fisher --fisher @f0 --fisher @f1"
    ),
    "merge adapters by data": Command(
        "merge adapters @a1 @a2 --method fisher --data @data --data @data"
    ),
    "merge fisher": Command("merge fisher --model @m0 --adapter-path @a1 --data @data"),
    "merge models": Command(
        "merge models @m0 @m1 --method fisher --fisher @f0 --fisher @f1"
    ),
    "merge models on a base": Command(
        "merge models @m1 --base @m0 --method task_arithmetic"
    ),
    "merge adapters by advice": Command(
        "merge adapters @a1 @a2 --model @m0 --method auto"
    ),
    "merge models by mergekit's file": Command(
        "merge models --config @settings/merge.yaml"
    ),
    "demo": Command("demo --model @m0", output="--output", overwrites=False),
}
FILES = {
    "analyze adapter": "analyze adapter @a1 --model @m0",
    "analyze compare": "analyze compare @a1 @a2 --model @m0",
    "analyze models": "analyze models @m0 @m1",
    "data": "data @data --model @m0 --num-layers -1",
    "evaluate": "evaluate --model @m0 --adapter-path @a1 --fused-path @m1 --data @data",
    "train": "train --model @m0 --data @data --iters 1 --adapter-path new",
    "fuse": "fuse --model @m0 --adapter-path @a1 --save-path new",
    "convert": "convert @a1 new --model @m0",
    "extract": "extract @m0 @m1 --rank 2 --save-path new",
    "merge adapters": "merge adapters @a1 @a2 --model @m0 --save-path new",
    "merge models": "merge models @m0 @m1 --save-path new",
    "merge fisher": "merge fisher --model @m0 --data @data --save-path new",
}


def digest(folder: Path) -> dict[str, str]:
    """Return a hash of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def near(path: Path, scratch: Path) -> Iterator[Path]:
    """Yield a path, its parent, a child, and links to the path and its parent."""
    number = len(list(scratch.iterdir()))
    link, above = scratch / f"link{number}", scratch / f"above{number}"
    link.symlink_to(path)
    above.symlink_to(path.parent)
    yield from (path, path.parent, path / "new", link, above / path.name, above)


def refuse(words: list[str]) -> None:
    result = CliRunner().invoke(group, [*words, "--quiet"])
    assert result.exit_code == 1, (words, result.output)
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stderr.startswith("Error: ")


@pytest.mark.parametrize("name", list(FOLDERS))
def test_inputs_are_refused_as_output_folders(
    name: str, material: Path, tmp_path: Path
) -> None:
    command = FOLDERS[name]
    before = digest(material)
    for source in command.inputs:
        for output in near(material / source, tmp_path):
            is_own = output.resolve() == (material / source).resolve()
            for overwrite in (False, True)[: 1 + command.overwrites]:
                if is_own and source in command.in_place and not overwrite:
                    continue
                refuse(command.line(material, output, overwrite))
                assert digest(material) == before, (source, output, overwrite)


@pytest.mark.parametrize("name", list(FILES))
def test_inputs_are_refused_as_output_files(
    name: str, material: Path, tmp_path: Path
) -> None:
    command = Command(FILES[name])
    before = digest(material)
    page = {"analyze": "--report", "data": "--html"}.get(name.split()[0])
    options = ("--json", page) if page else ("--json",)
    flags = [[], ["--overwrite"]]
    for source in command.inputs:
        file = next(path for path in (material / source).iterdir() if path.is_file())
        link = tmp_path / f"{source}-link"
        link.symlink_to(file)
        for output in (material / source, material, file, link):
            for option in options:
                for more in flags:
                    words = command.line(material, "", False)[:-2]
                    refuse([*words, option, str(output), *more])
                    assert digest(material) == before, (source, output)


def test_two_reports_cannot_share_a_file(material: Path, tmp_path: Path) -> None:
    both = str(tmp_path / "out")
    words = ["analyze", "adapter", str(material / "a1"), "--json", both]
    refuse([*words, "--report", both])
    refuse([*words, "--report", f"{tmp_path}/../{tmp_path.name}/out"])


@pytest.mark.parametrize("name", ["fuse", "merge models"])
def test_overwrite_replaces_only_outputs_of_mlx_dora(
    name: str, material: Path, tmp_path: Path
) -> None:
    command = FOLDERS[name]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    refuse(command.line(material, mine, True))
    assert (mine / "thesis.tex").read_text() == "years"
    out = tmp_path / "out"
    for overwrite in (False, True):
        result = CliRunner().invoke(group, command.line(material, out, overwrite))
        assert result.exit_code == 0, result.output
