"""Writes a fused model as GGUF through llama.cpp's own converter."""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mlx_dora.errors import DoRAError
from mlx_dora.export.modelfile import modelfile
from mlx_dora.io.atomic import write_text
from mlx_dora.io.json import read_object

CONVERTER = "convert_hf_to_gguf.py"
HOME_VARIABLE = "LLAMA_CPP"
"""Environment variable that names a folder of llama.cpp with its converter."""
MODEL_NAME = "model.gguf"


@dataclass(frozen=True, kw_only=True)
class GGUFModel:
    """What was done.

    Attributes:
        command: The command that writes the GGUF file, as it can be typed.
        path: The file, or None if the converter is not installed.
        has_template: Whether the Modelfile has a template of its own.
    """

    command: str
    path: Path | None
    has_template: bool


def check_exportable(folder: str | Path) -> None:
    """Refuse a model whose weights llama.cpp's converter cannot read.

    Raises:
        DoRAError: If the weights are packed in MLX's format.
    """
    if "quantization" in read_object(Path(folder) / "config.json"):
        raise DoRAError(
            f"{folder} has weights that MLX packed, which llama.cpp's converter does "
            "not read; fuse with --mode dequantize, and let llama.cpp quantize."
        )


def fused_to_gguf(folder: str | Path, *, outtype: str = "auto") -> GGUFModel:
    """Write ``model.gguf`` and a ``Modelfile`` for Ollama into a fused model's folder.

    The converter is looked up in the folder that ``LLAMA_CPP`` names, then on the PATH.
    Without it, only the Modelfile is written, and the result has the command to type.

    Args:
        folder: A fused model in float32, float16 or bfloat16.
        outtype: The converter's ``--outtype``.

    Raises:
        DoRAError: If the weights are packed, or the converter fails.
    """
    folder = Path(folder)
    check_exportable(folder)
    script = _converter()
    target = folder / MODEL_NAME
    program = CONVERTER if script is None else str(script)
    command = [
        *((sys.executable,) if script is not None else ("python",)),
        program,
        str(folder),
        "--outfile",
        str(target),
        "--outtype",
        outtype,
    ]
    text = modelfile(folder, f"./{MODEL_NAME}")
    write_text(folder / "Modelfile", text.content)
    if script is None:
        return GGUFModel(
            command=shlex.join(command), path=None, has_template=text.has_template
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not target.is_file():
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise DoRAError(
            f"{program} failed with exit code {done.returncode}: {last[-1]:.300}"
        )
    return GGUFModel(
        command=shlex.join(command), path=target, has_template=text.has_template
    )


def _converter() -> Path | None:
    """Return the converter's path, or None if it is not installed.

    Raises:
        DoRAError: If ``LLAMA_CPP`` names a folder without it.
    """
    home = os.environ.get(HOME_VARIABLE)
    if home:
        path = Path(home).expanduser() / CONVERTER
        if not path.is_file():
            raise DoRAError(f"{HOME_VARIABLE} is {home}, which has no {CONVERTER}.")
        return path
    on_path = shutil.which(CONVERTER)
    return None if on_path is None else Path(on_path)
