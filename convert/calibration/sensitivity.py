"""Choosing which layers get more bits, by the effect of rounding each one alone on the next tokens.

Every layer is rounded by itself at 4 bits, and the hidden states that result go through the rest of the
model beside the original's, all of them in one pass over the blocks, so that each block is read once.
The KL divergence at the end is the layer's cost; at other bits and group sizes it is taken to go with
the squared error of the weights. They are taken to add up, so choosing is the knapsack's greedy walk
along each layer's lower convex hull (Shoham and Gersho 1988). A walk is the best but for its last steps,
which are large where a layer is much of the model: embedding and head are tried at every option.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from math import prod

import mlx.core as mx

from convert.calibration.calibration import EMBEDDING, HEAD
from convert.calibration.grids import searched
from convert.progress import Count, Progress, Stage, untold
from convert.reading.layers import Layers, States, run, split
from convert.reading.softmax import Softmax
from convert.reading.source import Source
from convert.recipe import Plan
from convert.remaining import Remaining
from olmo3_mlx.quantization import Quantization

CANDIDATES = tuple(Quantization(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128))

# The share of a layer's cost that calibration leaves, measured on the two small checkpoints, each kind
# of layer alone; those of embedding and head beside the blocks' on other texts.
_GAINS = {
    "q_proj": 0.55,
    "k_proj": 0.57,
    "v_proj": 0.43,
    "o_proj": 0.47,
    "gate_proj": 0.65,
    "up_proj": 0.64,
    "down_proj": 0.68,
    "embed_tokens": 0.45,
    "lm_head": 0.75,
}
_SAMPLED_ROWS = 256
_STATES_BYTES = 2**31  # of the hidden states of all models but one layer
_LAYERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
Option = tuple[float, float, Quantization]  # the bits that a weight takes, the cost, and the scheme


def choose(
    source: Source,
    tokens: mx.array,
    target_bpw: float,
    candidates: Sequence[Quantization] = CANDIDATES,
    *,
    dtype: mx.Dtype | None = None,
    measured: Mapping[str, float] | None = None,
    keep: Callable[[Mapping[str, float]], None] = untold,
    stage: Stage = untold,
    progress: Progress | None = None,
) -> dict[str, Quantization]:
    """Choose a scheme for each layer, by its path, so that a weight takes at most `target_bpw` bits in all,
    norms and unquantized layers included, or as few as possible.

    Scales and what is not quantized are in `dtype`, by default the source's. Costs are measured on `tokens`
    [N, L], on as many of them as memory allows; the result is a function of the arguments alone. Layers whose
    inputs no group size divides are left out. `measured` are costs of an earlier run, new ones are given to
    `keep`. `stage` is told what it is at, `progress` how far.
    """
    if measured is None:
        each = len(_LAYERS) * source.config.num_hidden_layers * 4 * source.config.hidden_size
        many = _STATES_BYTES // each
        some = tokens[: max(1, many // tokens.shape[1]), : max(2, many)]
        keep(measured := costs(source, some, stage, progress))
    stage("weighing bits against each other")
    return allocate(source, measured, target_bpw, candidates, dtype=dtype, progress=progress)


def extremes(source: Source, candidates: Sequence[Quantization] = CANDIDATES) -> tuple[Plan, Plan]:
    """The plans that take the fewest and the most bits of all that `choose` may give."""
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
    """The same as `choose`, from costs that were `measured` before: path -> KL at 4 bits. `progress` counts
    layers.
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


def costs(
    source: Source, tokens: mx.array, stage: Stage = untold, progress: Progress | None = None
) -> dict[str, float]:
    """The KL divergence (nats a token) on tokens [N, L] of rounding each layer, by path, alone to 4 bits.

    `stage` is told which layer is rounded, `progress` through how many weights hidden states went, those of
    each model with a rounded layer for itself.
    """
    layers = Layers(source)
    stage("choosing bits, embedding")
    count = Count(sum(works := _works(source)), progress)
    # "" is the original
    states = {"": split(layers.embed(tokens)), EMBEDDING: split(_embedded(source, tokens))}
    left = Remaining(works)
    for index in range(layers.count):
        stage(f"choosing bits, layer {index + 1} of {layers.count}{left.in_words}")
        block = layers.block(index)
        size = _block_weights(source, index)
        hidden = states[""]
        for path, state in states.items():
            states[path] = run(block, state)
            count(size)
        for name in _LAYERS:
            weight = layers.weight(f"model.layers.{index}.{name}.weight")
            block.load_weights([(f"{name}.weight", _at_four_bits(weight))], strict=False)
            states[f"model.layers.{index}.{name}"] = run(block, hidden)
            block.load_weights([(f"{name}.weight", weight)], strict=False)
            count(size)
        left.end()
    stage(f"choosing bits, head{left.in_words}")
    measured = _divergences(layers, states, count)
    count.end()
    return measured


def _works(source: Source) -> list[int]:
    """The weights that `costs` sends hidden states through: in each block, and in the head."""
    works, many = [], 2  # the original, and the one with a rounded embedding
    for index in range(source.config.num_hidden_layers):
        many += len(_LAYERS)
        works.append(many * _block_weights(source, index))
    return [*works, (many + 1) * prod(Layers(source).head.shape)]  # a rounded head, and the original twice


def _block_weights(source: Source, index: int) -> int:
    start = f"model.layers.{index}."
    return sum(prod(tensor.shape) for name, tensor in source.tensors.items() if name.startswith(start))


def _divergences(layers: Layers, states: dict[str, States], count: Count) -> dict[str, float]:
    """The mean KL divergence of each path's states from the original's, "", after the head; and that of a
    rounded head.

    KL(p || q) = sum p (log p - log q) needs the normalizer of q and the mean of its logits under p. Both add
    up over pieces of the vocabulary, so that the head is read twice, whatever the number of states. `count`
    is told through how many of its weights they went.
    """
    headed = EMBEDDING if layers.config.tie_word_embeddings else HEAD
    normed = {}
    for path in list(states):  # one by one, so that they are not held twice
        normed[path] = layers.final_norm(mx.concatenate(states.pop(path), axis=1)[0])
        mx.eval(normed[path])
    original = normed[""]
    softmax = Softmax(len(original))
    for rows in layers.head_pieces():
        softmax.add_logits(original @ rows.T)
        count(rows.size)
    normalizer = softmax.normalizer
    paths = [path for path in normed if path not in ("", headed)] + [headed]
    expected = {path: mx.zeros(len(original)) for path in ("", *paths)}
    softmaxes = {path: Softmax(len(original)) for path in paths}
    for rows in layers.head_pieces():
        logits = original @ rows.T
        chance = mx.exp(logits - normalizer[:, None])
        expected[""] += (chance * logits).sum(-1)
        changed = _at_four_bits(rows)
        for path in paths:
            theirs = normed.get(path, original) @ (changed if path == headed else rows).T
            expected[path] += (chance * theirs).sum(-1)
            softmaxes[path].add_logits(theirs)
            mx.eval(expected[path])
            count(rows.size)
    own = expected[""] - normalizer
    each = {path: own - expected[path] + softmaxes[path].normalizer for path in paths}
    return {path: float(kl.mean().item()) for path, kl in each.items()}  # type: ignore[arg-type]


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
    at_four_bits = _error(sample, _probe(width)) or 1.0
    gain = _GAINS[path.rpartition(".")[2]]
    scale = (dtype or tensor.dtype).size * 8 * 2  # bits of a scale and a bias
    return [
        (scheme.bits + scale / scheme.group_size, gain * cost * _error(sample, scheme) / at_four_bits, scheme)
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
    rounded = searched(weight, mx.ones(weight.shape[1]), scheme, mx.bfloat16).dense()
    return float(mx.square(rounded - weight).mean().item())  # type: ignore[arg-type]


def _at_four_bits(weight: mx.array) -> mx.array:
    width = weight.shape[1]
    return searched(weight, mx.ones(width), _probe(width), mx.bfloat16).dense()


def _embedded(source: Source, tokens: mx.array) -> mx.array:
    """The hidden states that a rounded embedding gives for tokens."""
    hidden = Layers(source).embed(tokens)
    return _at_four_bits(hidden.reshape(-1, hidden.shape[-1])).reshape(hidden.shape)
