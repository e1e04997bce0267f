"""MLX's memory settings while a model trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


@contextmanager
def wired_memory() -> Iterator[None]:
    """Keep up to the recommended working set resident on an Apple GPU, as mlx-lm does.

    Restores the limit at the end. On other devices, does nothing.
    """
    limit = mx.device_info().get("max_recommended_working_set_size")
    if not mx.metal.is_available() or not isinstance(limit, int):
        yield
        return
    before = mx.set_wired_limit(limit)
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)


def trim_cache(threshold: int) -> None:
    """Free MLX's buffer cache if it holds more bytes than `threshold`."""
    if mx.get_cache_memory() > threshold:
        mx.clear_cache()
