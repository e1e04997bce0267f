"""DoRA (weight-decomposed low-rank adaptation, arXiv:2402.09353) for MLX.

Importing it loads OpenBLAS where MLX computes on a Linux CPU (`mlx_dora.openblas`), so
import it before mlx there. The public names are loaded on first use.
"""

from typing import TYPE_CHECKING

from mlx_dora.lazy import public_names
from mlx_dora.openblas import preload

if TYPE_CHECKING:
    from mlx_dora.adapters.config import DoRAConfig
    from mlx_dora.adapters.files import Adapter, load_adapter, save_adapter
    from mlx_dora.adapters.hosting import load, use_in_mlx_lm
    from mlx_dora.adapters.named import NamedAdapters
    from mlx_dora.adapters.surgery import apply_dora, disabled, remove_dora
    from mlx_dora.analyze.adapter import analyze_adapter
    from mlx_dora.analyze.compare import compare_adapters
    from mlx_dora.analyze.decomposition import DoRADecomposition
    from mlx_dora.analyze.finetune import analyze_finetune
    from mlx_dora.data.loading import load_datasets
    from mlx_dora.decomposition import dora_decompose, dora_merge
    from mlx_dora.errors import DoRAError
    from mlx_dora.fuse.model import fuse_dora, fuse_model
    from mlx_dora.layers import (
        DoRAEmbedding,
        DoRALinear,
        DoRAMultiLinear,
        DoRASwitchLinear,
    )
    from mlx_dora.merge.adapters.extract import extract_adapter
    from mlx_dora.merge.adapters.merge import merge_adapters
    from mlx_dora.merge.models.merge import merge_models
    from mlx_dora.peft import from_peft, to_peft
    from mlx_dora.train.config import TrainConfig
    from mlx_dora.train.grpo.config import RewardConfig
    from mlx_dora.train.objectives.config import PreferenceConfig
    from mlx_dora.train.plan.predict import plan_memory
    from mlx_dora.train.run.finetune import finetune

preload()

__version__ = "0.2.0"

_HOME = {
    "Adapter": "mlx_dora.adapters.files",
    "DoRAConfig": "mlx_dora.adapters.config",
    "DoRADecomposition": "mlx_dora.analyze.decomposition",
    "DoRAEmbedding": "mlx_dora.layers",
    "DoRAError": "mlx_dora.errors",
    "DoRALinear": "mlx_dora.layers",
    "DoRAMultiLinear": "mlx_dora.layers",
    "DoRASwitchLinear": "mlx_dora.layers",
    "NamedAdapters": "mlx_dora.adapters.named",
    "PreferenceConfig": "mlx_dora.train.objectives.config",
    "RewardConfig": "mlx_dora.train.grpo.config",
    "TrainConfig": "mlx_dora.train.config",
    "analyze_adapter": "mlx_dora.analyze.adapter",
    "analyze_finetune": "mlx_dora.analyze.finetune",
    "apply_dora": "mlx_dora.adapters.surgery",
    "compare_adapters": "mlx_dora.analyze.compare",
    "disabled": "mlx_dora.adapters.surgery",
    "dora_decompose": "mlx_dora.decomposition",
    "dora_merge": "mlx_dora.decomposition",
    "extract_adapter": "mlx_dora.merge.adapters.extract",
    "finetune": "mlx_dora.train.run.finetune",
    "from_peft": "mlx_dora.peft",
    "fuse_dora": "mlx_dora.fuse.model",
    "fuse_model": "mlx_dora.fuse.model",
    "load": "mlx_dora.adapters.hosting",
    "load_adapter": "mlx_dora.adapters.files",
    "load_datasets": "mlx_dora.data.loading",
    "merge_adapters": "mlx_dora.merge.adapters.merge",
    "merge_models": "mlx_dora.merge.models.merge",
    "plan_memory": "mlx_dora.train.plan.predict",
    "remove_dora": "mlx_dora.adapters.surgery",
    "save_adapter": "mlx_dora.adapters.files",
    "to_peft": "mlx_dora.peft",
    "use_in_mlx_lm": "mlx_dora.adapters.hosting",
}

__all__ = [
    "Adapter",
    "DoRAConfig",
    "DoRADecomposition",
    "DoRAEmbedding",
    "DoRAError",
    "DoRALinear",
    "DoRAMultiLinear",
    "DoRASwitchLinear",
    "NamedAdapters",
    "PreferenceConfig",
    "RewardConfig",
    "TrainConfig",
    "analyze_adapter",
    "analyze_finetune",
    "apply_dora",
    "compare_adapters",
    "disabled",
    "dora_decompose",
    "dora_merge",
    "extract_adapter",
    "finetune",
    "from_peft",
    "fuse_dora",
    "fuse_model",
    "load",
    "load_adapter",
    "load_datasets",
    "merge_adapters",
    "merge_models",
    "plan_memory",
    "remove_dora",
    "save_adapter",
    "to_peft",
    "use_in_mlx_lm",
]

__getattr__, __dir__ = public_names(__name__, _HOME, more=("__version__",))
