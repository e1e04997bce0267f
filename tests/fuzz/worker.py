"""A process that tries cases one after the other and writes down what came of each.

``python -m tests.fuzz.worker MATERIAL SCRATCH SEED LOG``; numbers are read
from stdin, a line each. LOG gets a line when a case begins and one when it ends: what
has begun and not ended killed the process.
"""

from mlx_dora import openblas

openblas.preload()

import contextlib  # noqa: E402 - the two lines above come first
import gc  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

import click  # noqa: E402
import mlx.core as mx  # noqa: E402

from mlx_dora.errors import DoRAError  # noqa: E402
from tests.fuzz.cases import (  # noqa: E402
    Case,
    NotFiniteError,
    check_outputs,
    listing,
    make_case,
)

ROOT = Path(__file__).parents[2]
LONGEST_ERROR = 1_000


def attempt(case: Case, folder: Path, watched: list[Path]) -> tuple[str, str]:
    """Run a case: ("taken" or "refused" or "fault", what is to be said of it)."""
    before = [listing(path) for path in watched]
    shown = io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            case.action()
        outcome, detail = "taken", ""
        check_outputs(folder)
    except (DoRAError, OSError, click.ClickException) as error:
        outcome, detail = "refused", str(error)
        if len(detail) > LONGEST_ERROR and isinstance(error, DoRAError):
            outcome, detail = "fault", f"an error of {len(detail)} characters"
    except NotFiniteError as error:
        verb = " ".join(case.what.split()[:3])
        outcome, detail = "fault", f"NaN or inf came out of {verb}: {error}"
    except Exception as error:
        outcome, detail = "fault", _signature(error)
    finally:
        os.chdir(ROOT)
    if [listing(path) for path in watched] != before:
        outcome, detail = "fault", "a file outside the output folder changed"
    if "\x1b]0;" in shown.getvalue():
        outcome, detail = "fault", "an escape sequence was printed"
    return outcome, detail


def _signature(error: BaseException) -> str:
    """The kind of an error, our innermost line and the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [one for one in frames if "/mlx_dora/" in one.filename]
    places = [*(ours[-1:]), *(frames[-1:] if frames[-1:] != ours[-1:] else [])]
    shown = [f"{Path(one.filename).name}:{one.lineno} {one.name}" for one in places]
    return f"{type(error).__name__} in {' from '.join(shown)}: {str(error)[:160]}"


def main(material: Path, scratch: Path, seed: int, log: Path) -> None:
    """Try the cases whose numbers come on stdin."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    scratch.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:

        def note(**facts: object) -> None:
            file.write(json.dumps(facts) + "\n")
            file.flush()

        note(ready=True)
        for number in map(int, sys.stdin):
            folder = scratch / str(number)
            shutil.rmtree(folder, ignore_errors=True)
            case = make_case(number, seed, material, folder)
            facts = {"kind": case.kind, "what": case.what, "damage": case.damage}
            note(begun=number, **facts)
            outcome, detail = attempt(case, folder, [folder, material])
            note(case=number, **facts, outcome=outcome, detail=detail)
            shutil.rmtree(folder, ignore_errors=True)
            if number % 64 == 0:
                gc.collect()
                mx.clear_cache()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
