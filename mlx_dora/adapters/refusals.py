"""Refuses modules that cannot be adapted, before anything is changed."""

from collections.abc import Mapping, Sequence

import mlx.nn as nn

from mlx_dora.adapters.keys import natural_order, shortened
from mlx_dora.errors import DoRAError
from mlx_dora.layers import check_adaptable, weight_of


def check_classes(
    modules: Mapping[str, nn.Module], variants: Mapping[str, str], hint: str
) -> None:
    """Refuse modules whose class the requested variant cannot adapt.

    Args:
        modules: All modules of the model, by path.
        variants: The variant for each path to adapt.
        hint: Text to append to the message.

    Raises:
        DoRAError: If a module cannot be adapted; lists the paths of each class.
    """
    problems: dict[str, list[str]] = {}
    for path in sorted(variants, key=natural_order):
        try:
            check_adaptable(modules[path], variants[path])
        except DoRAError as error:
            problems.setdefault(str(error), []).append(path)
    if problems:
        lines = [f"{shortened(paths)}: {error}" for error, paths in problems.items()]
        raise DoRAError(" ".join(lines) + hint)


def check_ranks(
    modules: Mapping[str, nn.Module], ranks: Mapping[str, int], *, are_named: bool
) -> None:
    """Refuse ranks above min(out, in), which add nothing.

    Args:
        modules: All modules of the model, by path.
        ranks: The rank for each path to adapt.
        are_named: Whether the user named the modules. If all modules are adapted, a few
            small modules (a gate with one output) may be smaller than the rank.

    Raises:
        DoRAError: If a rank is too large; names the module, its shape and the rank.
    """
    own = " or give the module its own rank with rank_pattern."
    for path, rank in ranks.items() if are_named else ():
        if rank > _largest_rank(modules[path]):
            raise DoRAError(_beyond(path, modules[path], rank) + own)
    if ranks and not are_named:
        check_cut(modules, list(ranks), max(ranks.values()))


def check_cut(
    modules: Mapping[str, nn.Module], paths: Sequence[str], rank: int
) -> None:
    """Refuse a rank above min(out, in) of every matrix.

    Raises:
        DoRAError: If so; names the largest matrix, its shape and the rank.
    """
    largest = max(paths, key=lambda path: _largest_rank(modules[path]))
    if rank > _largest_rank(modules[largest]):
        raise DoRAError(_beyond(largest, modules[largest], rank).rstrip(",") + ".")


def _largest_rank(module: nn.Module) -> int:
    return min(weight_of(module).shape[-2:])


def _beyond(path: str, module: nn.Module, rank: int) -> str:
    shape = tuple(weight_of(module).shape[-2:])
    return (
        f"{path} has shape {shape}: its adapter has a rank of at most "
        f"{min(shape)}, got {rank}; lower the rank,"
    )


def check_started(model: nn.Module) -> None:
    """Refuse a model with a class that does not call ``nn.Module.__init__``.

    MLX initializes the list of frozen parameters there. recurrent_gemma of mlx-lm
    0.32.2 does not call it.
    """
    for path, module in model.named_modules():
        if "_no_grad" not in vars(module):
            kind = type(module)
            raise DoRAError(
                f"{path or 'the model'}: {kind.__module__}.{kind.__name__} does not "
                "call nn.Module.__init__, so it cannot be frozen or trained."
            )


def check_dense(blocks: Sequence[tuple[str, nn.Module]]) -> None:
    """Refuse packed weights in full fine-tuning, which trains the weights themselves.

    Args:
        blocks: Paths and modules that full fine-tuning unfreezes.

    Raises:
        DoRAError: If a module is packed; names the modules.
    """
    packed = [
        f"{path}.{name}"
        for path, block in blocks
        for name, module in block.named_modules()
        if "scales" in module
    ]
    if packed:
        packed.sort(key=natural_order)
        raise DoRAError(
            "full fine-tuning trains the weights themselves, which must not be "
            f"quantized as in {shortened(packed)}; train DoRA or LoRA, or dequantize "
            "the model first (mlx_lm.convert --dequantize)."
        )
