"""The figures of a quality card: how far a converted checkpoint is from its original."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convert.card.divergence import Divergence
from convert.reading.softmax import Floats
from convert.size import Size

HISTOGRAM_EDGES: tuple[float, ...] = tuple(10 ** (exponent / 4) for exponent in range(-28, 9))  # 1e-7 to 100
_WORST = 10
RUN = 32  # positions that stand for one where an error is estimated
_DRAWS = 200  # of the bootstrap
_QUANTILES = (0.5, 0.99, 0.999)


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
    """One token to be predicted: in sequence `sequence`, the one at `position`, whose id is `actual`;
    `kind` is the kind of text.

    Pairs are (original, result): each one's most likely token, its probability, and that of `actual`.
    """

    sequence: int
    position: int
    kl: float
    actual: int
    top: tuple[int, int]
    top_probability: tuple[float, float]
    actual_probability: tuple[float, float]
    kind: str


@dataclass(frozen=True)
class Figures:
    """How far `result` is from `original` on `tokens` predicted tokens. Pairs are (original, result).

    KL is KL(original || result) of next-token distributions, in nats. `agreement` is the share of positions
    whose most likely token is the same. `probability_*` are absolute differences in the probability of the
    token that came. Each `*_error` is a standard error, of means from those over runs of positions, as
    neighbours resemble each other, of quantiles from drawing such runs anew (a bootstrap over clusters;
    B. Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979).
    """

    tokens: int
    perplexity: tuple[float, float]
    perplexity_ratio: float
    perplexity_ratio_error: float
    kl_mean: float
    kl_error: float
    kl_median: float
    kl_median_error: float
    kl_99: float
    kl_99_error: float
    kl_999: float
    kl_999_error: float
    kl_max: float
    agreement: float
    agreement_error: float
    probability_mean: float
    probability_99: float


@dataclass(frozen=True)
class Quality(Figures):
    """The same on all texts together, and by kind of text in `kinds`.

    `histogram` counts positions whose KL lies between HISTOGRAM_EDGES, with those below and above in the
    first and last place. `worst` are the positions with the largest KL.
    """

    histogram: tuple[int, ...]
    worst: tuple[Position, ...]
    layers: tuple[LayerError, ...]
    sizes: tuple[Size, Size]
    kinds: Mapping[str, Figures]


def summary(
    divergence: Divergence,
    actual: NDArray[np.int64],
    kinds: Sequence[str],
    layers: tuple[LayerError, ...],
    sizes: tuple[Size, Size],
) -> Quality:
    """Sum up the divergence of every position; `actual` [N, P] are the tokens that came, in N sequences of
    `kinds`.
    """
    kl, edges = divergence.kl, HISTOGRAM_EDGES
    counts = np.bincount(np.searchsorted(edges, kl), minlength=len(edges) + 1)
    worst = np.argsort(-kl, kind="stable")[:_WORST]
    rows = {kind: np.array([k == kind for k in kinds]) for kind in dict.fromkeys(kinds)}
    return Quality(
        **vars(_figures(divergence, actual.shape, np.ones(len(kinds), bool))),
        histogram=tuple(map(int, counts)),
        worst=tuple(_position(divergence, actual, kinds, int(i)) for i in worst),
        layers=layers,
        sizes=sizes,
        kinds={kind: _figures(divergence, actual.shape, mask) for kind, mask in rows.items()},
    )


def _figures(divergence: Divergence, shape: tuple[int, ...], rows: NDArray[np.bool_]) -> Figures:
    """The figures of the sequences in `rows` [N], of positions of this shape, [N, P]."""

    def of(values: Floats) -> Floats:
        chosen: Floats = values.reshape(shape)[rows]
        return chosen

    kl, log = of(divergence.kl), [of(p) for p in divergence.log_probability]
    same = of((divergence.top[0] == divergence.top[1]).astype(np.float64))
    apart = np.abs(np.exp(log[0]) - np.exp(log[1]))
    ratio = float(np.exp((log[0] - log[1]).mean()))
    (median, high, highest), errors = quantiles(kl)
    return Figures(
        tokens=kl.size,
        perplexity=(perplexity(log[0]), perplexity(log[1])),
        perplexity_ratio=ratio,
        perplexity_ratio_error=ratio * standard_error(log[0] - log[1]),  # of its logarithm, to first order
        kl_mean=float(kl.mean()),
        kl_error=standard_error(kl),
        kl_median=median,
        kl_median_error=errors[0],
        kl_99=high,
        kl_99_error=errors[1],
        kl_999=highest,
        kl_999_error=errors[2],
        kl_max=float(kl.max()),
        agreement=float(same.mean()),
        agreement_error=standard_error(same),
        probability_mean=float(apart.mean()),
        probability_99=float(np.quantile(apart, 0.99)),
    )


def standard_error(values: Floats) -> float:
    """The standard error of the mean of `values` [N, P], whose rows are neighbours; 0 for a single value."""
    means = np.array([run.mean() for run in _runs(values)])
    return float(means.std(ddof=1) / np.sqrt(means.size)) if means.size > 1 else 0.0


def quantiles(values: Floats) -> tuple[list[float], list[float]]:
    """The median and the 99th and 99.9th percentiles of `values` [N, P], whose rows are neighbours; and their
    standard errors.
    """
    runs, draw = _runs(values), np.random.default_rng(0)
    drawn = [
        np.quantile(np.concatenate([runs[i] for i in draw.integers(len(runs), size=len(runs))]), _QUANTILES)
        for _ in range(_DRAWS if len(runs) > 1 else 0)
    ]
    errors = np.std(drawn, axis=0, ddof=1).tolist() if drawn else [0.0] * len(_QUANTILES)
    return np.quantile(values, _QUANTILES).tolist(), errors


def _runs(values: Floats) -> list[Floats]:
    """The values [N, P] in runs of neighbours; one by one, if there is but one run."""
    pieces = max(1, values.shape[1] // RUN)
    runs = [run for row in values for run in np.array_split(row, pieces)]
    return runs if len(runs) > 1 else list(values.reshape(-1, 1))


def perplexity(log_probability: Floats) -> float:
    """The perplexity of tokens whose log-probabilities these are."""
    return float(np.exp(-log_probability.mean()))


def _position(
    divergence: Divergence, actual: NDArray[np.int64], kinds: Sequence[str], index: int
) -> Position:
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
        kind=kinds[sequence],
    )
