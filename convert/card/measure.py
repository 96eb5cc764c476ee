"""Measuring how far one checkpoint is from another, block by block, so that neither is in memory whole.

    quality = measure(Source.open(original), Source.open(result), tokens)     # tokens [N, L]
    print(quality.kl_mean, quality.agreement)

In memory at once: one block in float32, pieces of both heads with their logits, and the hidden states of
both models, N * L * hidden_size * 4 bytes each.
"""

from collections.abc import Iterable, Sequence
from math import prod

import mlx.core as mx
import numpy as np

from convert.card.divergence import divergence
from convert.card.quality import LayerError, Quality, summary
from convert.progress import Count, Progress
from convert.reading.finite import check_all_finite
from convert.reading.layers import Layers, States, run, split
from convert.reading.source import Source
from convert.reading.stored import Tensor
from olmo3_mlx.errors import CheckpointError, ConvertError, OptionError, PromptError

_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
)  # fmt: skip


def measure(
    original: Source,
    result: Source,
    tokens: mx.array,
    progress: Progress | None = None,
    *,
    kinds: Sequence[str] | None = None,
) -> Quality:
    """Measure how far `result` is from `original` on texts, `tokens` [N, L], from their second tokens on.

    `kinds` are those of the N sequences; left out they are all of one kind, "text". Each block is read once,
    however many kinds there are.

    `progress(done, total)` counts the weights of both that have been read; a tied head, which is read twice,
    counts once. Raises ConvertError for two architectures or vocabularies, naming what differs; OptionError
    for fewer than two tokens or more than the context; PromptError for an id outside the vocabulary;
    CheckpointError for weights that are not finite.
    """
    check_comparable(original, result)
    _check_tokens(original, result, tokens)
    first, second = Layers(original), Layers(result)
    count = Count(original.parameters + result.parameters, progress)
    ours, theirs = split(first.embed(tokens)), split(second.embed(tokens))
    count(2 * original.config.vocab_size * original.config.hidden_size)
    off = _distance(ours, theirs)
    errors = [LayerError("embed_tokens", "embedding", off, off)]
    for index, kind in enumerate(original.config.layer_types):
        ours, theirs, accumulated, added = _through(first, second, index, ours, theirs)
        errors.append(LayerError(f"layers.{index}", kind.removesuffix("_attention"), accumulated, added))
        count(2 * _elements(_of_block(original, index)))
    if not np.isfinite([e.accumulated for e in errors]).all():
        bad = next(e.name for e in errors if not np.isfinite(e.accumulated))
        raise _not_finite(original, result, f"{bad} gives what is not finite")
    actual = np.array(tokens[:, 1:], np.int64)
    hidden = (_predicting(ours), _predicting(theirs))
    del ours, theirs
    predictions = divergence(first, second, hidden, actual.ravel(), count)
    if not np.isfinite(predictions.kl).all():
        raise _not_finite(original, result, "logits are not finite")
    count.end()
    kinds = ["text"] * len(actual) if kinds is None else kinds
    return summary(predictions, actual, kinds, tuple(errors), (original.size, result.size))


def _not_finite(original: Source, result: Source, symptom: str) -> CheckpointError:
    """The error to raise: it names a checkpoint's weight that is not finite, or else the symptom."""
    try:
        for source in (original, result):
            check_all_finite(source)
    except CheckpointError as error:
        return error
    return CheckpointError(f"{original.folder}, {result.folder}: {symptom}, although all weights are")


def check_comparable(original: Source, result: Source) -> None:
    """Raise ConvertError, naming what differs, unless both are of one architecture and vocabulary. How
    they rotate and how far sliding layers see may differ: stages of training do.
    """
    each = {name: (getattr(original.config, name), getattr(result.config, name)) for name in _SAME}
    differ = [f"{name} ({a} and {b})" for name, (a, b) in each.items() if a != b]
    layers = list(zip(original.config.layer_types, result.config.layer_types, strict=False))
    first = next((i for i, (a, b) in enumerate(layers) if a != b), None)
    if first is not None:  # one of them, as there may be 64
        differ.append(f"layer_types (of layers.{first}: {' and '.join(layers[first])})")
    if differ:
        raise ConvertError(
            f"{original.folder} and {result.folder} cannot be compared: they differ in {', '.join(differ)}"
        )


def context(original: Source, result: Source) -> int:
    """How many tokens both models take."""
    return min(original.config.max_position_embeddings, result.config.max_position_embeddings)


def _check_tokens(original: Source, result: Source, tokens: mx.array) -> None:
    if tokens.ndim != 2 or tokens.shape[0] < 1:
        raise PromptError(f"expected token ids of shape [N, L], not {list(tokens.shape)}")
    longest = context(original, result)
    if not 2 <= tokens.shape[1] <= longest:
        raise OptionError(
            f"a sequence must have from 2 tokens to as many as the context, {longest}, not {tokens.shape[1]}"
        )


def _through(
    first: Layers, second: Layers, index: int, ours: States, theirs: States
) -> tuple[States, States, float, float]:
    """Send both models' states through block `index`: the states after it, how far they are apart, and how
    far this block alone takes them. The second block is read when the first is gone.
    """
    block = first.block(index)
    after = run(block, ours)
    del block
    block = second.block(index)
    alone = _distance(after, run(block, ours))
    theirs = run(block, theirs)
    return after, theirs, _distance(after, theirs), alone


def _distance(ours: States, theirs: States) -> float:
    """The mean over all positions of |ours - theirs| / |ours|. Not the ratio of two sums, which would be
    that of the positions whose states are longest.
    """
    each = []
    for a, b in zip(ours, theirs, strict=True):
        ratio = mx.linalg.norm(a - b, axis=-1) / mx.maximum(mx.linalg.norm(a, axis=-1), 1e-30)
        each.append(np.array(ratio, np.float64).ravel())
    return float(np.concatenate(each).mean())


def _predicting(states: States) -> mx.array:
    """The states that predict a token which is there: all but each sequence's last, [N * (L - 1), hidden]."""
    hidden = mx.concatenate([state[0, :-1] for state in states])
    mx.eval(hidden)
    return hidden


def _of_block(source: Source, index: int) -> list[Tensor]:
    return [t for name, t in source.tensors.items() if name.startswith(f"model.layers.{index}.")]


def _elements(tensors: Iterable[Tensor]) -> int:
    return sum(prod(tensor.shape) for tensor in tensors)
