"""Converts an adapter's config to and from JSON, and pads ranks for mlx-lm."""

import logging
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import mlx.core as mx

from mlx_dora.adapters.adapter import Adapter, BaseModel, rank_axis, rank_of
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.key_form import kept_form
from mlx_dora.errors import DoRAError, printable
from mlx_dora.io.hub_id import lasting_name
from mlx_dora.options import option, option_problems

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
PLAIN = "dora"
"""The only parametrization in files; the training summary names the trained variant."""
PARENT = ".."
"""Recorded as the base by an adapter that lies in the folder of its base."""


def config_json(adapter: Adapter) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``."""
    config = adapter.config
    form = kept_form(config, adapter.paths)
    parameters = None
    if adapter.fine_tune_type != "full":
        parameters = replace(config, keys=form.keys).lora_parameters()
    return {
        "fine_tune_type": adapter.fine_tune_type,
        "num_layers": form.num_layers,
        "lora_parameters": parameters,
        "mlx_dora": {
            "version": FORMAT_VERSION,
            "base": {
                "model": _base_name(adapter.base.model),
                "fingerprint": adapter.base.fingerprint,
            },
            "variant": PLAIN,
            "rank_pattern": config.rank_pattern,
            "training": None if adapter.training is None else dict(adapter.training),
        },
    }


def _base_name(model: str | None) -> str | None:
    return model if model in (None, PARENT) else lasting_name(model)


def parse_config(
    content: dict[str, Any], where: object = "adapter_config.json"
) -> Adapter:
    """Parse ``adapter_config.json``, ours or mlx-lm's, into an adapter without tensors.

    Configs of mlx-lm up to 0.18 use ``lora_layers`` and ``use_dora``; later versions
    use ``num_layers`` and ``fine_tune_type``.

    Args:
        content: The JSON object.
        where: Name for warnings, for example the file.

    Raises:
        DoRAError: If a value is missing or invalid.
    """
    # LoRA is mlx-lm's default. If both names are present, it reads the newer name.
    early = "dora" if content.get("use_dora") is True else "lora"
    kind = content.get("fine_tune_type", early)
    if kind not in ("dora", "lora", "full"):
        raise DoRAError(f"fine_tune_type must be dora, lora or full, got {kind!r}.")
    ours = content.get("mlx_dora")
    if ours is not None and not isinstance(ours, dict):
        raise DoRAError(f"mlx_dora must be an object, got {ours!r:.60}.")
    parameters: dict[str, Any] = {}
    if kind != "full":
        parameters = _lora_parameters(content, ours is None)
    config = DoRAConfig.from_lora_parameters(
        parameters, num_layers=content.get("num_layers", content.get("lora_layers", -1))
    )
    if ours is None and kind != "full":
        _warn_of_alpha(content["lora_parameters"], config, where)
    if ours is None:
        model = content.get("model")
        base = BaseModel(model=model if isinstance(model, str) else None)
        return Adapter(config=config, tensors={}, base=base, fine_tune_type=kind)
    given: dict[str, Any] = {f.name: ours.get(f.name) for f in fields(_Section)}
    section = _Section(**given)
    for problem in option_problems(section):
        raise DoRAError(f"mlx_dora.{problem}.")
    if section.version > FORMAT_VERSION:
        raise DoRAError(
            f"format version {section.version} is newer than this mlx_dora supports "
            f"({FORMAT_VERSION}); upgrade mlx_dora."
        )
    base = section.base or {}
    return Adapter(
        config=replace(config, rank_pattern=ours.get("rank_pattern")),
        tensors={},
        base=BaseModel(model=base.get("model"), fingerprint=base.get("fingerprint")),
        fine_tune_type=kind,
        training=section.training,
    )


@dataclass(frozen=True, kw_only=True)
class _Section:
    """The section ``mlx_dora`` of a config, but for the rank pattern."""

    version: int = option(help="Version of the format.")
    base: dict[str, str | None] | None = option(help="Name and hash of the base.")
    training: dict[str, Any] | None = option(help="Summary of the training.")
    variant: Literal["dora"] | None = option(help="Parametrization of the tensors.")


def _lora_parameters(content: dict[str, Any], is_host: bool) -> dict[str, Any]:
    parameters = content.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise DoRAError(f"lora_parameters must be an object, got {parameters!r:.60}.")
    if is_host and "scale" in parameters:
        # Configs for mlx-lm often contain keys that it ignores, such as alpha.
        known = ("rank", "scale", "dropout", "keys")
        return {key: value for key, value in parameters.items() if key in known}
    missing = [key for key in ("rank", "scale") if key not in parameters]
    if missing and "alpha" not in parameters:
        raise DoRAError(f"lora_parameters lacks {' and '.join(missing)}.")
    return parameters


def _warn_of_alpha(
    parameters: dict[str, Any], config: DoRAConfig, where: object
) -> None:
    """Warn that ``alpha`` beside ``scale`` is ignored, although it may matter.

    mlx-lm up to 0.14.1 multiplied by scale * alpha / rank. Later versions ignore alpha,
    but configs still contain it. A file does not say which version wrote it.
    """
    alpha = parameters.get("alpha")
    if alpha is None or alpha == config.rank:
        return
    early = ""
    if isinstance(alpha, int | float):
        early = f" = {config.scale * alpha / config.rank:g}"
    logger.warning(
        "%s: alpha %s is ignored, the update is multiplied by scale %g. mlx-lm up to "
        "0.14.1 multiplied by scale * alpha / rank%s: for an adapter that it trained, "
        "set scale to this value and remove alpha.",
        where,
        printable(repr(alpha), 60),
        config.scale,
        early,
    )


def pad_rank(name: str, tensor: mx.array, rank: int) -> mx.array:
    """Pad a low-rank factor with zeros to `rank`; stock mlx-lm reads a single rank."""
    leaf = name.rpartition(".")[2]
    if leaf == "m" or rank_of(leaf, tensor) == rank:
        return tensor
    widths = [(0, 0)] * tensor.ndim
    widths[rank_axis(leaf, tensor.ndim)] = (0, rank - rank_of(leaf, tensor))
    return mx.pad(tensor, widths)


def strip_rank(tensors: dict[str, mx.array], config: DoRAConfig) -> dict[str, mx.array]:
    """Undo `pad_rank`; keep factors without zero padding, which are refused later."""
    stripped = dict(tensors)
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        true = config.rank_of(path)
        if leaf not in ("lora_a", "lora_b") or tensor.ndim not in (2, 3):
            continue
        if rank_of(leaf, tensor) == config.rank and true < config.rank:
            axis = rank_axis(leaf, tensor.ndim)
            factor, padding = mx.split(tensor, [true], axis=axis)
            if not mx.any(padding != 0):
                stripped[name] = mx.contiguous(factor)
    return stripped
