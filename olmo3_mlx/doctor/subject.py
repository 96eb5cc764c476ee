"""A model that is looked at: loaded once, when a check first asks for it."""

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise

import mlx.core as mx

from olmo3_mlx.caches.cache import Cache
from olmo3_mlx.checkpoints.checkpoint import Checkpoint
from olmo3_mlx.doctor.finding import PASSED, Outcome, judged
from olmo3_mlx.model import Olmo3

_TEXT = (
    "Is this machine sound? A model reads these words twice, in passes of other lengths and from caches of "
    "other forms, and has to come to the same numbers each time. What differs is not the text but the way. "
)


class Subject:
    """A checkpoint, the model in it, and ids for it to read."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: Sequence[int] | None = None,
        dtype: str | Callable[[Checkpoint], str | None] | None = None,
    ) -> None:
        """`ids` are left out for those of a text, `dtype`, which may be found out when the model is loaded,
        for what it computes in by default.
        """
        self.checkpoint = checkpoint
        self._given, self._dtype = ids, dtype
        self.seconds = 0.0  # of a pass over one token

    @cached_property
    def model(self) -> Olmo3:
        """The model. Raises what Checkpoint.load raises."""
        dtype = self._dtype(self.checkpoint) if callable(self._dtype) else self._dtype
        return self.checkpoint.load(dtype)

    @cached_property
    def as_stored(self) -> "Subject":
        """The same in the type that it computes in by default; itself where that is its own."""
        same = self.checkpoint.itemsize() == self.model.dtype.size
        return self if same else Subject(self.checkpoint, self.ids)

    @cached_property
    def ids(self) -> Sequence[int]:
        """Some 260 ids that it may be given; of the vocabulary alone where it has no tokenizer."""
        if self._given is not None:
            return self._given
        vocabulary = self.checkpoint.config.vocab_size
        if (self.checkpoint.folder / "tokenizer.json").is_file():
            ids = self.checkpoint.tokenizer.encode(_TEXT)
            ids = [id_ for id_ in ids if id_ < vocabulary]
        else:
            ids = [7919 * i % vocabulary for i in range(1, 260)]
        return (ids * (260 // max(1, len(ids)) + 1))[
            : min(260, self.checkpoint.config.max_position_embeddings)
        ]

    def load(self) -> Outcome:
        """Load it, and let it read one token, twice: the first pass also makes kernels ready."""
        begun = time.perf_counter()
        model = self.model
        loaded = time.perf_counter() - begun
        for _ in range(2):
            begun = time.perf_counter()
            logits = model(mx.array([self.ids[:1]]))
            finite = bool(mx.isfinite(logits).all().item())
            self.seconds = time.perf_counter() - begun
        dtype = str(model.dtype).rpartition(".")[2]
        if not finite:
            return judged(False, f"its logits are NaN or infinite in {dtype}")
        return Outcome(
            PASSED, f"loaded in {loaded:.1f} s, in {dtype}; a token takes {1000 * self.seconds:.0f} ms"
        )

    def run(self, ids: Sequence[int], chunk: int) -> mx.array:
        """Logits [n, V] after each of the ids, read `chunk` at a time into fresh caches."""
        ends = [*range(0, len(ids), chunk), len(ids)]
        return self.passes(ids, ends, self.model.make_caches())

    def passes(self, ids: Sequence[int], ends: Sequence[int], caches: list[Cache]) -> mx.array:
        """Logits [n, V] after each of the ids from the first of `ends` to the last, a pass from each to the
        next.
        """
        pieces = []
        for start, stop in pairwise(ends):
            pieces.append(self.model(mx.array([ids[start:stop]]), caches)[0])
            mx.eval(pieces[-1], [cache.state for cache in caches])
        return mx.concatenate(pieces)
