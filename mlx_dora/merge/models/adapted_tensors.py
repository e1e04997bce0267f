"""Reads a model with an adapter (``model+adapter``), fused while it is read."""

from pathlib import Path

import mlx.core as mx

from mlx_dora.adapters.attach import all_problems
from mlx_dora.adapters.files import load_adapter
from mlx_dora.adapters.hosting import load_lazily, model_folder
from mlx_dora.adapters.matrices import adapted_modules
from mlx_dora.errors import DoRAError
from mlx_dora.kernels.fusing import dense_fused
from mlx_dora.matrix import Adapted
from mlx_dora.merge.methods.blockwise import Tensor
from mlx_dora.merge.models.model_tensors import ModelTensors
from mlx_dora.peft import from_peft

_PEFT = ("adapter_model.safetensors", "adapter_model.bin")


def open_model(name: str) -> ModelTensors:
    """Open a model folder or Hub id, or one with an adapter: ``model+adapter``.

    As in mergekit, ``model@revision`` names a revision of a Hub id.

    Raises:
        DoRAError: If a part is missing or invalid, or the adapter does not fit.
    """
    model, plus, adapter = name.rpartition("+")
    if Path(name).expanduser().is_dir():
        return ModelTensors(model_folder(name))
    if not plus:
        return ModelTensors(_folder(name))
    folder = Path(adapter).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise DoRAError(
            f"{name}: {adapter} is not a local adapter folder (it has no "
            "adapter_config.json); download the adapter and give its path."
        )
    return AdaptedTensors(_folder(model), folder)


def _folder(name: str) -> Path:
    """The folder of a model; a Hub id may name a revision: ``owner/model@revision``."""
    model, at, revision = name.partition("@")
    if not at or Path(name).expanduser().exists():
        return model_folder(name)
    return model_folder(model, revision=revision)


class AdaptedTensors(ModelTensors):
    """The tensors of a model into which a LoRA or DoRA adapter is fused.

    An adapted weight is computed in float32, without rounding, when it is read.

    Args:
        folder: The model's folder.
        adapter: Folder of the adapter, mlx-lm's or PEFT's.

    Raises:
        DoRAError: If the adapter does not fit, or adapts other layers than linear ones.
    """

    def __init__(self, folder: Path, adapter: Path) -> None:
        super().__init__(folder)
        self._adapter = adapter
        model = load_lazily(folder)
        is_peft = any((adapter / name).is_file() for name in _PEFT)
        loaded = from_peft(adapter, model) if is_peft else load_adapter(adapter)
        if problems := all_problems(model, loaded, check_base=False):
            raise DoRAError(f"{self.label}: {'; '.join(problems)}.")
        if loaded.fine_tune_type == "full":
            raise DoRAError(f"{self.label}: fully fine-tuned weights are no adapter.")
        if all_problems(model, loaded, check_base=True):
            self.notes.append(f"{adapter} was trained on another model than {folder}.")
        modules = dict(model.named_modules())
        adapted = adapted_modules(
            loaded, {path: modules[path] for path in loaded.paths}
        )
        self._adapted: dict[str, Adapted] = {}
        for path, matrices in adapted.items():
            name = f"{path}.weight"
            is_known = name in self.names and len(self.shape(name)) == 2
            if not is_known or len(matrices) > 1 or self.holds_tokens(name):
                raise DoRAError(
                    f"{self.label}: {path} is not a linear layer that the checkpoint "
                    "stores by this name; fuse the adapter first (mlx_dora.fuse)."
                )
            self._adapted[name] = matrices[0]

    @property
    def label(self) -> str:
        """What messages call the model."""
        return f"{self.folder}+{self._adapter}"

    @property
    def files(self) -> list[Path]:
        """All files that determine the tensors."""
        return [*super().files, *sorted(self._adapter.glob("*.safetensors"))]

    def read(self, name: str) -> mx.array:
        """Read a tensor, unpacked and evaluated; float32 if it is adapted."""
        tensor = super().read(name)
        adapted = self._adapted.get(self.original(name))
        if adapted is None:
            return tensor
        fused = dense_fused(tensor, adapted, mx.float32)
        mx.eval(fused)
        return fused

    def source(self, name: str) -> Tensor:
        """Open a float tensor for reading in blocks; an adapted one is fused whole."""
        is_adapted = self.original(name) in self._adapted
        return self.read(name) if is_adapted else super().source(name)
