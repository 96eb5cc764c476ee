"""The figures of a quality card: how far a converted checkpoint is from its original."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convert.card.divergence import Divergence
from convert.reading.softmax import Floats
from convert.size import Size

HISTOGRAM_EDGES: tuple[float, ...] = tuple(10 ** (exponent / 4) for exponent in range(-28, 9))  # 1e-7 to 100
_WORST = 10
_RUN = 32  # positions that stand for one where the error of a mean is estimated


@dataclass(frozen=True)
class LayerError:
    """How far hidden states are off after one layer: the mean over positions of |difference| / |original|.

    `accumulated` compares each model on its own states; `added` gives the result's layer the states of
    the original, so that it is this layer's doing alone. `kind` is the layer's type, or "embedding".
    """

    name: str
    kind: str
    accumulated: float
    added: float


@dataclass(frozen=True)
class Position:
    """One token to be predicted: in sequence `sequence`, the one at `position`, whose id is `actual`.

    Pairs are (original, result): each one's most likely token, its probability, and that of `actual`.
    """

    sequence: int
    position: int
    kl: float
    actual: int
    top: tuple[int, int]
    top_probability: tuple[float, float]
    actual_probability: tuple[float, float]


@dataclass(frozen=True)
class Quality:
    """How far `result` is from `original` on `tokens` predicted tokens. Pairs are (original, result).

    KL is KL(original || result) of next-token distributions, in nats; `kl_error` is the standard error of
    its mean, from means over runs of positions, as neighbours resemble each other. `agreement` is the
    share of positions whose most likely token is the same. `probability_*` are absolute differences in
    the probability of the token that came. `histogram` counts positions whose KL lies between
    HISTOGRAM_EDGES, with those below and above in the first and last place.
    """

    tokens: int
    perplexity: tuple[float, float]
    kl_mean: float
    kl_error: float
    kl_median: float
    kl_99: float
    kl_max: float
    agreement: float
    probability_mean: float
    probability_99: float
    histogram: tuple[int, ...]
    worst: tuple[Position, ...]
    layers: tuple[LayerError, ...]
    sizes: tuple[Size, Size]


def summary(
    divergence: Divergence,
    actual: NDArray[np.int64],
    layers: tuple[LayerError, ...],
    sizes: tuple[Size, Size],
) -> Quality:
    """Sum up the divergence of every position; `actual` [N, P] are the tokens that came."""
    kl, edges = divergence.kl, HISTOGRAM_EDGES
    counts = np.bincount(np.searchsorted(edges, kl), minlength=len(edges) + 1)
    worst = np.argsort(-kl, kind="stable")[:_WORST]
    probabilities = [np.exp(p) for p in divergence.log_probability]
    apart = np.abs(probabilities[0] - probabilities[1])
    return Quality(
        tokens=kl.size,
        perplexity=(perplexity(divergence.log_probability[0]), perplexity(divergence.log_probability[1])),
        kl_mean=float(kl.mean()),
        kl_error=standard_error(kl.reshape(actual.shape)),
        kl_median=float(np.median(kl)),
        kl_99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        agreement=float((divergence.top[0] == divergence.top[1]).mean()),
        probability_mean=float(apart.mean()),
        probability_99=float(np.quantile(apart, 0.99)),
        histogram=tuple(map(int, counts)),
        worst=tuple(_position(divergence, actual, int(i)) for i in worst),
        layers=layers,
        sizes=sizes,
    )


def standard_error(values: Floats) -> float:
    """The standard error of the mean of `values` [N, P], whose rows are neighbours; 0 for a single value."""
    pieces = max(1, values.shape[1] // _RUN)
    means = np.array([run.mean() for row in values for run in np.array_split(row, pieces)])
    if means.size < 2:
        means = values.ravel()
    return float(means.std(ddof=1) / np.sqrt(means.size)) if means.size > 1 else 0.0


def perplexity(log_probability: Floats) -> float:
    """The perplexity of tokens whose log-probabilities these are."""
    return float(np.exp(-log_probability.mean()))


def _position(divergence: Divergence, actual: NDArray[np.int64], index: int) -> Position:
    sequence, position = divmod(index, actual.shape[1])
    return Position(
        sequence=sequence,
        position=position + 1,  # the first token of a sequence is not predicted
        kl=float(divergence.kl[index]),
        actual=int(actual[sequence, position]),
        top=(int(divergence.top[0][index]), int(divergence.top[1][index])),
        top_probability=(
            float(divergence.top_probability[0][index]),
            float(divergence.top_probability[1][index]),
        ),
        actual_probability=(
            float(np.exp(divergence.log_probability[0][index])),
            float(np.exp(divergence.log_probability[1][index])),
        ),
    )
