"""Models whose training on an Apple GPU needs a gradient that its kernels lack."""

import json
import subprocess
import sys
from pathlib import Path

import mlx_lm
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.train.metal import WITHOUT_GRADIENT, check_gradients
from tests.compat.causes import GATED_DELTA
from tests.compat.tiny_models import build, model_files
from tests.processes import ROOT

# Files of mlx-lm that make kernels of their own.
FILES = {
    "kernels/expert_routing.py",
    "kernels/norm_add_norm.py",
    "kernels/post_expert_norm_combine.py",
    "kernels/qk_norm.py",
    "kernels/qk_norm_rope.py",
    "kernels/rms_norm_sigmoid_gate.py",
    "models/bitlinear_layers.py",
    "models/deepseek_v41.py",
    "models/gated_delta.py",
    "models/kimi_k3.py",
    "models/rwkv7.py",
    "models/ssm.py",
    "tuner/losses.py",
}


def test_every_model_with_such_a_kernel_is_listed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.compat.gpu_branches"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    delta = {name: decay for decay, names in GATED_DELTA.items() for name in names}
    found = result["without_gradient"]
    models = model_files().keys()  # an older mlx-lm has fewer
    assert result["gated_delta"] == {n: d for n, d in delta.items() if n in models}
    assert found.keys() == WITHOUT_GRADIENT.keys() & models
    for name, kernels in found.items():
        first, _, more = WITHOUT_GRADIENT[name].partition(" and ")
        assert first in kernels
        assert len(kernels) == (7 if more == "six more" else 1)


def test_no_other_file_of_mlx_lm_makes_kernels() -> None:
    home = Path(mlx_lm.__file__).parent
    found = {
        path.relative_to(home).as_posix()
        for path in home.rglob("*.py")
        if "metal_kernel(" in path.read_text(encoding="utf-8")
    }
    assert not found - FILES, "run tests/compat/gpu_branches.py; see WITHOUT_GRADIENT"


@pytest.mark.parametrize("name", ["rwkv7", "qwen3_5"])
def test_they_are_refused_on_metal_only(name: str) -> None:
    model = build(name)
    check_gradients(model, on_metal=False)
    if name not in WITHOUT_GRADIENT:
        check_gradients(model, on_metal=True)
        return
    match = r"rwkv7 cannot be trained on an Apple GPU.*no gradient \(wkv7_kernel\)"
    with pytest.raises(DoRAError, match=match) as error:
        check_gradients(model, on_metal=True)
    assert "\n" not in str(error.value)
