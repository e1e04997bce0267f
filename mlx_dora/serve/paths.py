"""The models and adapters that a request may name."""

import re
from dataclasses import dataclass
from pathlib import Path

from mlx_dora.errors import DoRAError

DEFAULT = "default_model"  # mlx-lm's name for the command line's model
MAX_NAME = 1000

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class NotServedError(DoRAError):
    """A request names a model or an adapter that is not served."""


@dataclass(frozen=True, kw_only=True)
class ServedPaths:
    """Resolves the model and adapter names of requests to folders that are served.

    Args:
        model: Folder or Hub id of the default model, if there is one.
        adapter: Folder of the default model's adapter, if there is one.
        draft: Folder or Hub id of the default draft model, if there is one.
        root: Folder that holds the models and adapters that requests may name.
    """

    model: str | None = None
    adapter: str | None = None
    draft: str | None = None
    root: Path | None = None

    def __post_init__(self) -> None:
        """Refuse a root that does not exist.

        Raises:
            DoRAError: If the root is not a folder.
        """
        if self.root is not None and not self.root.is_dir():
            raise DoRAError(f"adapter root {self.root} is not a folder.")

    def choose(
        self, model: str, adapter: str | None, draft: str | None
    ) -> tuple[str, str | None, str | None]:
        """Return the folders of a request's model, adapter and draft model.

        An adapter is applied to the model that the request names, or to the default
        model. If the request names no adapter, the default model uses the adapter of
        the command line, and any other model uses none.

        Args:
            model: Model of the request; ``default_model`` if it names none.
            adapter: Adapter of the request; None if it names none.
            draft: Draft model of the request; None for no draft model.

        Raises:
            NotServedError: If a name is not on the command line, not a folder inside
                the root, and not (for models) in the cache of the Hub.
        """
        if model == DEFAULT and self.model is None:
            raise NotServedError("the server has no default model: name a model.")
        chosen = self.model if model == DEFAULT else None
        chosen = chosen or self._find("model", model, self.model)
        if adapter is not None:
            beside = self._find("adapter", adapter, self.adapter)
        else:
            beside = self.adapter if model == DEFAULT else None
        if draft is not None:
            is_default = draft == DEFAULT
            draft = self.draft if is_default else self._find("model", draft, self.draft)
        return chosen, beside, draft

    def _find(self, kind: str, name: str, own: str | None) -> str:
        if own is not None and _is_same(name, own):
            return own
        inside = None if self.root is None else folder_inside(self.root, name)
        marker = "adapter_config.json" if kind == "adapter" else "config.json"
        if inside is not None and (inside / marker).is_file():
            return str(inside)
        if kind == "model" and (cached := _in_hub_cache(name)) is not None:
            return cached
        where = (
            "the server was started without --adapter-root"
            if self.root is None
            else "there is no such folder below the server's --adapter-root"
        )
        hint = "" if kind == "adapter" else ", and no such model in the Hub's cache"
        raise NotServedError(
            f"{kind} {name[:MAX_NAME]!r} is not served: {where}{hint}."
        )


def _resolved(path: Path) -> Path | None:
    """The path without links and ``..``; None if it is not a valid path."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # link loops, NUL, too long
        return None


def _is_same(name: str, own: str) -> bool:
    if name == own:
        return True
    folder = Path(own)
    return folder.exists() and _resolved(Path(name)) == folder.resolve()


def folder_inside(root: Path, name: str) -> Path | None:
    """Return the folder `name` below `root`, after links; None if it lies elsewhere."""
    folder = _resolved(root / name) if len(name) <= MAX_NAME else None
    if folder is None or not folder.is_relative_to(root.resolve()):
        return None
    return folder if folder.is_dir() else None


def _in_hub_cache(name: str) -> str | None:
    """The local snapshot of a Hub model; requests never download models."""
    if len(name) > MAX_NAME or not _HUB_ID.fullmatch(name):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        return None
