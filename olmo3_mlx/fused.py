"""Elementwise work in few kernels, where that can be had."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import mlx.core as mx

P = ParamSpec("P")


def fused(function: Callable[P, mx.array], *, shapeless: bool = False) -> Callable[P, mx.array]:
    """The same function, compiled on a GPU, where each kernel is a wait; `shapeless` once for all shapes."""
    compiled: Callable[P, mx.array] = mx.compile(function, shapeless=shapeless)

    @wraps(function)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> mx.array:
        # On a CPU mx.compile calls a C++ compiler at run time, which may not be there.
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        return compiled(*args, **kwargs) if on_gpu else function(*args, **kwargs)

    return chosen
