"""Sharing out bits among layers, from what it costs to round each one alone to 4 bits.

At other bits and group sizes a cost is taken to go with the squared error of the weights. Costs are taken to
add up, so choosing is the knapsack's greedy walk along the lower convex hulls of the layers' options (Shoham
and Gersho 1988). A walk is the best but for its last steps, which are large where a layer is much of the
model: embedding and head are tried at every option.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from math import prod

import mlx.core as mx

from convert.calibration.calibration import EMBEDDING, HEAD
from convert.calibration.grids import searched
from convert.progress import Count, Progress
from convert.reading.source import Source
from convert.recipe import Plan
from olmo3_mlx.quantization import Quantization

CANDIDATES = tuple(Quantization(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128))

_SAMPLED_ROWS = 256
Option = tuple[float, float, Quantization]  # the bits that a weight takes, the cost, and the scheme


def extremes(source: Source, candidates: Sequence[Quantization] = CANDIDATES) -> tuple[Plan, Plan]:
    """The plans that take the fewest and the most bits of all that `allocate` may give."""
    least, most = {}, {}
    for name, tensor in source.tensors.items():
        fitting = [scheme for scheme in candidates if tensor.shape[-1] % scheme.group_size == 0]
        if len(tensor.shape) == 2 and fitting:
            path = name.removesuffix(".weight")
            least[path] = min(fitting, key=lambda scheme: (scheme.bits, -scheme.group_size))
            most[path] = max(fitting, key=lambda scheme: (scheme.bits, -scheme.group_size))
    return Plan(least), Plan(most)


def allocate(
    source: Source,
    measured: Mapping[str, float],
    target_bpw: float,
    candidates: Sequence[Quantization] = CANDIDATES,
    *,
    dtype: mx.Dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, Quantization]:
    """Choose a scheme for each layer, by its path, so that a weight takes at most `target_bpw` bits in all,
    norms and unquantized layers included, or as few as possible.

    `measured` are the costs of rounding each layer alone to 4 bits, by path. Scales and what is not quantized
    are in `dtype`, by default the source's. Layers whose inputs no group size divides are left out.
    `progress` counts layers.
    """
    hulls, count = {}, Count(len(measured), progress)
    for path, cost in measured.items():
        hulls[path] = _hull(_options(source, path, cost, candidates, dtype))
        count(1)
    hulls = {path: hull for path, hull in hulls.items() if hull}
    sizes = {name.removesuffix(".weight"): prod(tensor.shape) for name, tensor in source.tensors.items()}
    rest = sum(
        (dtype or tensor.dtype).size * 8 * sizes[name.removesuffix(".weight")]
        for name, tensor in source.tensors.items()
        if name.removesuffix(".weight") not in hulls
    )
    budget = target_bpw * sum(sizes.values()) - rest
    large = [path for path in (EMBEDDING, HEAD) if path in hulls]
    plans = [
        _walk({**hulls, **dict(zip(large, ([option] for option in fixed), strict=True))}, sizes, budget)
        for fixed in product(*(hulls[path] for path in large))
    ]
    fitting = [plan for plan in plans if _bits(plan, sizes) <= budget]
    best = min(fitting, key=_cost) if fitting else min(plans, key=lambda plan: _bits(plan, sizes))
    return {path: scheme for path, (_, _, scheme) in best.items()}


def _walk(
    hulls: Mapping[str, Sequence[Option]], sizes: Mapping[str, int], budget: float
) -> dict[str, Option]:
    """Give each layer its fewest bits, then take the steps along the hulls that gain most a bit, while they
    fit.
    """
    chosen = dict.fromkeys(hulls, 0)
    left = budget - sum(sizes[path] * hull[0][0] for path, hull in hulls.items())
    steps = [
        (_slope(a, b) / sizes[path], path, i, sizes[path] * (b[0] - a[0]))
        for path, hull in hulls.items()
        for i, (a, b) in enumerate(pairwise(hull))
    ]
    for _, path, i, price in sorted(steps):
        if chosen[path] == i and price <= left:
            chosen[path] = i + 1
            left -= price
    return {path: hulls[path][i] for path, i in chosen.items()}


def _bits(plan: Mapping[str, Option], sizes: Mapping[str, int]) -> float:
    return sum(sizes[path] * option[0] for path, option in plan.items())


def _cost(plan: Mapping[str, Option]) -> float:
    return sum(cost for _, cost, _ in plan.values())


def _options(
    source: Source, path: str, cost: float, candidates: Sequence[Quantization], dtype: mx.Dtype | None
) -> list[Option]:
    """The options of the layer at `path`; costs after calibration are guessed from squared errors."""
    tensor = source.tensors[f"{path}.weight"]
    rows, width = tensor.shape
    fitting = [scheme for scheme in candidates if width % scheme.group_size == 0]
    if not fitting:
        return []
    step = max(1, rows // _SAMPLED_ROWS)
    sample = mx.concatenate([tensor.rows(i, i + 1).astype(mx.float32) for i in range(0, rows, step)])
    least = _error(sample, _probe(width)) or 1.0
    scale = (dtype or tensor.dtype).size * 8 * 2  # bits of a scale and a bias
    return [
        (scheme.bits + scale / scheme.group_size, cost * _error(sample, scheme) / least, scheme)
        for scheme in fitting
    ]


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull of options: ever more bits, ever less gained by each."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: o[:2]):
        if hull and option[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _probe(width: int) -> Quantization:
    """The scheme by which a layer with `width` inputs is measured; it has 1 group if none of MLX's fits."""
    return Quantization(4, next((g for g in (64, 32) if width % g == 0), width))


def _error(weight: mx.array, scheme: Quantization) -> float:
    return float(mx.square(_rounded(weight, scheme) - weight).mean().item())  # type: ignore[arg-type]


def at_four_bits(weight: mx.array) -> mx.array:
    """A weight [rows, n] rounded as it is when its layer is measured."""
    return _rounded(weight, _probe(weight.shape[1]))


def _rounded(weight: mx.array, scheme: Quantization) -> mx.array:
    return searched(weight, mx.ones(weight.shape[1]), scheme, mx.bfloat16).dense()
