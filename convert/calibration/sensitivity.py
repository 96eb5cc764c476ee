"""What it costs to round each layer alone, measured by gradients on the checkpoint at hand.

Every layer is rounded by itself to 4 bits. An error e in its outputs changes the KL divergence of the next
tokens by about (g e)^2 / 2, with the gradient g of convert.calibration.gradients. One pass through the blocks
and one back give that for all layers.

Texts of several kinds count alike, each by its layers' shares of what all of them cost on it: what is
rounded costs some kinds of text many times what it costs others, in nats.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod

import mlx.core as mx
import numpy as np

from convert.calibration.allocation import CANDIDATES, allocate, at_four_bits
from convert.calibration.calibration import EMBEDDING, HEAD
from convert.calibration.gradients import back_by_layer, last_gradients, states_between, that_fit
from convert.progress import Count, Progress, Stage, untold
from convert.reading.layers import ATTENDING, BLOCK_LAYERS, OUT, Layers, States, split
from convert.reading.softmax import Floats, Softmax
from convert.reading.source import Source
from convert.remaining import Remaining
from olmo3_mlx.quantization import Quantization

_SEQUENCES = 16  # looked at, at most
_LENGTH = 256  # tokens of each, at most


def choose(
    source: Source,
    tokens: mx.array,
    target_bpw: float,
    candidates: Sequence[Quantization] = CANDIDATES,
    *,
    kinds: Sequence[str] | None = None,
    dtype: mx.Dtype | None = None,
    measured: Mapping[str, float] | None = None,
    keep: Callable[[Mapping[str, float]], None] = untold,
    stage: Stage = untold,
    progress: Progress | None = None,
) -> dict[str, Quantization]:
    """Choose a scheme for each layer as `allocate` does, by costs measured on some of tokens [N, L], of which
    the first are to be a fair mix; `kinds` are the kinds of text of the N sequences.

    The result is a function of the arguments alone. `measured` are costs of an earlier run, new ones are
    given to `keep`. `stage` is told what it is at, `progress` how far.
    """
    if measured is None:
        keep(measured := costs(source, tokens, kinds, stage, progress))
    stage("weighing bits against each other")
    return allocate(source, measured, target_bpw, candidates, dtype=dtype, progress=progress)


def costs(
    source: Source,
    tokens: mx.array,
    kinds: Sequence[str] | None = None,
    stage: Stage = untold,
    progress: Progress | None = None,
) -> dict[str, float]:
    """The share of each layer, by path, in what rounding every layer alone to 4 bits costs, on the first
    sequences of tokens [N, L]: as many as memory allows. `kinds` are the kinds of text of the N sequences;
    the shares are the mean over them.

    `stage` is told what it is at, `progress` how many weights states and gradients went through.
    """
    layers = Layers(source)
    text = that_fit(layers, tokens[:, :_LENGTH], _SEQUENCES)
    stage("choosing bits, reading the text")
    blocks = sum(map(layers.block_weights, range(layers.count)))
    count = Count(3 * blocks + 4 * prod(layers.head.shape), progress)
    states = states_between(layers, text, count)
    stage("choosing bits, head")
    found = {EMBEDDING: np.zeros(len(text)), HEAD: _head_costs(layers, states[-1], count)}
    gradients = last_gradients(layers, states.pop(), count)
    left = Remaining([1.0] * layers.count)
    for index in reversed(range(layers.count)):
        stage(f"choosing bits, layer {index + 1} of {layers.count}{left.in_words}")
        gradients, block = _block_costs(layers, index, states.pop(), gradients, count)
        found |= block
        left.end()
    hidden = layers.embed(text)
    rounded = at_four_bits(hidden.reshape(-1, hidden.shape[-1])).reshape(hidden.shape)
    embedding = zip(split(rounded - hidden), gradients, strict=True)
    found[EMBEDDING] = np.array([_cost(error[0], gradient[0]) for error, gradient in embedding])
    if layers.config.tie_word_embeddings:
        found[EMBEDDING] = found[EMBEDDING] + found.pop(HEAD)
    count.end()
    return _shares(found, list(kinds or ())[: len(text)])


def _block_costs(
    layers: Layers, index: int, states: States, gradients: States, count: Count
) -> tuple[States, dict[str, Floats]]:
    """Go back through a block: the gradients before it, and its layers' costs on each sequence, by path."""
    block, before, each = layers.block(index), [], []
    for state, gradient in zip(states, gradients, strict=True):
        after, at = back_by_layer(block, state, gradient)
        before.append(after)
        each.append(at)
    count(layers.block_weights(index))
    found = {}
    for name in BLOCK_LAYERS:
        path = f"model.layers.{index}.{name}"
        weight = layers.weight(f"{path}.weight")
        rounded = at_four_bits(weight)
        # An error in these moves what other positions get too: it is followed to the outputs of attention.
        if name in ATTENDING:
            block.load_weights([(f"{name}.weight", rounded)], strict=False)
            errors = [block.self_attn(x, None) - at[OUT].outputs for x, at in zip(states, each, strict=True)]
            block.load_weights([(f"{name}.weight", weight)], strict=False)
            slopes = [at[OUT].gradient for at in each]
        else:
            errors = [at[name].inputs @ (rounded - weight).T for at in each]
            slopes = [at[name].gradient for at in each]
        found[path] = np.array([_cost(e, slope) for e, slope in zip(errors, slopes, strict=True)])
        count(weight.size)
    return before, found


def _cost(error: mx.array, gradient: mx.array) -> float:
    """The mean KL divergence that an error in vectors [L, n] adds, in nats a token."""
    return float(mx.square((error * gradient).sum(-1)).mean().item()) / 2  # type: ignore[arg-type]


def _head_costs(layers: Layers, hidden: States, count: Count) -> Floats:
    """The mean KL divergence on each sequence if the head is rounded, from the states behind the last block.

    KL(p || q) = sum p (log p - log q) needs both normalizers and the mean, under p, of how much larger p's
    logits are. All add up over pieces of the vocabulary, so that each is read and rounded once.
    """
    normed = layers.final_norm(mx.concatenate(hidden, axis=1)[0])
    ours, theirs = Softmax(len(normed)), Softmax(len(normed))
    apart: Floats = np.zeros(len(normed))  # sum of exp(logit - largest) * (logit - the other's logit)
    for rows in layers.head_pieces():
        logits, others = normed @ rows.T, normed @ at_four_bits(rows).T
        theirs.add_logits(others)
        count(rows.size)
        largest = logits.max(-1, keepdims=True)
        chance = mx.exp(logits - largest)
        pieces = (largest[:, 0], chance.sum(-1), (chance * (logits - others)).sum(-1))
        highest, total, more = (np.array(each, np.float64) for each in pieces)
        before, now = ours.add(highest, total)
        apart = apart * before + more * now
        count(rows.size)
    each = apart / ours.total - ours.log_total + theirs.log_total
    means: Floats = each.reshape(len(hidden), -1).mean(-1)
    return means


def _shares(found: Mapping[str, Floats], kinds: Sequence[str]) -> dict[str, float]:
    """Each layer's share of all costs, by path, as the mean over kinds of text, from costs by sequence."""
    of_kind = np.array(kinds or [""] * len(next(iter(found.values()))))
    every = sorted(set(of_kind.tolist()))
    shares = dict.fromkeys(found, 0.0)
    for kind in every:
        of_paths = {path: float(each[of_kind == kind].mean()) for path, each in found.items()}
        whole = sum(of_paths.values()) or 1.0
        for path, cost in of_paths.items():
            shares[path] += cost / whole / len(every)
    return shares
