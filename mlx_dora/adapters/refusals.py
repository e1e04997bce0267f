"""What of a model cannot be adapted, named before anything is changed."""

from collections.abc import Mapping

import mlx.nn as nn

from mlx_dora.adapters.keys import natural_order, shortened
from mlx_dora.errors import DoRAError
from mlx_dora.layers import check_adaptable


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
