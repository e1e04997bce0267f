"""What of a model cannot be adapted, named before anything is changed."""

from collections.abc import Mapping, Sequence

import mlx.nn as nn

from mlx_dora.adapters.keys import natural_order, shortened
from mlx_dora.errors import DoRAError
from mlx_dora.layers import check_adaptable, weight_of


def check_classes(
    modules: Mapping[str, nn.Module], variants: Mapping[str, str], hint: str
) -> None:
    """Refuse modules whose class the variant asked for cannot adapt.

    Args:
        modules: Every module of the model, by its path.
        variants: The variant for each path to adapt.
        hint: What to end the message with.

    Raises:
        DoRAError: One message a class, with all the paths it is at.
    """
    problems: dict[str, list[str]] = {}
    for path in sorted(variants, key=natural_order):
        try:
            check_adaptable(modules[path], variants[path])
        except DoRAError as error:
            problems.setdefault(str(error), []).append(path)
    if problems:
        told = [f"{shortened(paths)}: {error}" for error, paths in problems.items()]
        raise DoRAError(" ".join(told) + hint)


def check_ranks(
    modules: Mapping[str, nn.Module], ranks: Mapping[str, int], *, are_named: bool
) -> None:
    """Refuse to make adapters of a rank above min(out, in), which adds nothing.

    Args:
        modules: Every module of the model, by its path.
        ranks: The rank of each path to adapt.
        are_named: The user named the modules. Where they are all there are, a few small
            ones (a gate with one output) may be below the rank that suits the rest.

    Raises:
        DoRAError: Naming the module, its shape and the rank.
    """
    own = " or give the module its own with rank_pattern."
    for path, rank in ranks.items() if are_named else ():
        if rank > _largest_rank(modules[path]):
            raise DoRAError(_beyond(path, modules[path], rank) + own)
    if ranks and not are_named:
        check_cut(modules, list(ranks), max(ranks.values()))


def check_cut(
    modules: Mapping[str, nn.Module], paths: Sequence[str], rank: int
) -> None:
    """Refuse a rank that is above min(out, in) of every matrix.

    Raises:
        DoRAError: Naming the largest matrix, its shape and the rank.
    """
    largest = max(paths, key=lambda path: _largest_rank(modules[path]))
    if rank > _largest_rank(modules[largest]):
        raise DoRAError(_beyond(largest, modules[largest], rank).rstrip(",") + ".")


def _largest_rank(module: nn.Module) -> int:
    return min(weight_of(module).shape[-2:])


def _beyond(path: str, module: nn.Module, rank: int) -> str:
    shape = tuple(weight_of(module).shape[-2:])
    return (
        f"{path} has shape {shape}: an adapter of it has a rank of at most "
        f"{min(shape)}, got {rank}; lower the rank,"
    )


def check_started(model: nn.Module) -> None:
    """Refuse a model with a class that does not call ``nn.Module.__init__``.

    MLX keeps there what is frozen (mlx-lm 0.32.2's recurrent_gemma forgets it).
    """
    for path, module in model.named_modules():
        if "_no_grad" not in vars(module):
            kind = type(module)
            raise DoRAError(
                f"{path or 'the model'}: {kind.__module__}.{kind.__name__} does not "
                "call nn.Module.__init__, so it cannot be frozen or trained."
            )


def check_dense(blocks: Sequence[tuple[str, nn.Module]]) -> None:
    """Refuse packed weights where they themselves are to be trained.

    Args:
        blocks: What full fine-tuning unfreezes, with the paths.

    Raises:
        DoRAError: Naming the packed modules.
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
            f"quantised as in {shortened(packed)}; train DoRA or LoRA, or dequantize "
            "the model first (mlx_lm.convert --dequantize)."
        )
