"""A conversation's tokens and their caches, which can go back, and run only what is new.

Going back takes the nearest way: the caches rewind, or a snapshot is restored, and what is missing runs.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Unpack

import mlx.core as mx

from olmo3_mlx.caches.cache import rewind
from olmo3_mlx.caches.options import CacheKeywords, CacheOptions
from olmo3_mlx.errors import CacheError, PromptError, SessionError
from olmo3_mlx.generation.loop import LanguageModel, Progress, Sample, decode, prefill
from olmo3_mlx.generation.unfinished import Unfinished
from olmo3_mlx.memory.plan import MemoryPlan, check_context
from olmo3_mlx.option_checks import check_number
from olmo3_mlx.sessions.files import SessionFiles
from olmo3_mlx.sessions.snapshots import Snapshots
from olmo3_mlx.sessions.spans import SpanStore, common_length
from olmo3_mlx.token_ids import check_token_ids

SNAPSHOT_BYTES = 2**31  # of snapshots in memory, unless told


class Session:
    """Tokens, and caches that hold them. Knows ids and a model, no text."""

    def __init__(
        self,
        model: LanguageModel,
        options: CacheOptions | None = None,
        *,
        context: int | None = None,
        snapshot_bytes: int = SNAPSHOT_BYTES,
        files: SessionFiles | None = None,
        **keywords: Unpack[CacheKeywords],
    ) -> None:
        """A session for at most `context` tokens, as many as the model takes unless given. Its
        caches have the form that `options` say, or the same as keywords (kv_bits=8, ...). Snapshots take at
        most `snapshot_bytes` of memory; the least recently used go beyond that, to `files` if there are any.

        Raises OptionError for a value outside its range.
        """
        check_context(model.config, context)
        check_number("snapshot_bytes", snapshot_bytes, lambda n: n >= 0, "of at least 0", whole=True)
        self.context: int = model.config.max_position_embeddings if context is None else context
        self.vocab_size: int = model.config.vocab_size
        self._model = model
        self._options = CacheOptions.of(options, **keywords)
        self._files = files
        self._snapshots = Snapshots(SpanStore(snapshot_bytes, files))
        self._tokens: list[int] = []
        self._decoding = Unfinished()
        self._start_anew()

    @classmethod
    def within(
        cls, model: LanguageModel, plan: MemoryPlan, *, files: SessionFiles | None = None
    ) -> "Session":
        """A session as a memory plan says: its context, its caches' options, and snapshots in half of what
        the plan leaves, at most SNAPSHOT_BYTES.
        """
        snapshot_bytes = min(SNAPSHOT_BYTES, plan.left // 2)
        return cls(model, plan.options, context=plan.context, snapshot_bytes=snapshot_bytes, files=files)

    @property
    def tokens(self) -> Sequence[int]:
        """What the caches hold; while an answer is being decoded, what they held before it."""
        if not self._decoding:
            self._recover()
        return self._tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""
        return sum(cache.nbytes for cache in self.caches)

    @property
    def growth(self) -> int:
        """Bytes that making room takes for a while: the largest cache once more."""
        return max(cache.nbytes for cache in self.caches)

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of the snapshots in memory."""
        return self._snapshots.store.nbytes

    def clear(self) -> None:
        """Forget everything, on disk too."""
        self._forget()
        if self._files is not None:
            self._files.clear()

    def drop_snapshots(self) -> None:
        """Forget the snapshots in memory; those on disk stay."""
        self._snapshots.store.clear()

    def goto(self, position: int) -> int:
        """Go back to where the first `position` tokens are held; returns how many of them had to run.

        Raises CacheError if there are not so many tokens.
        """
        self._end_decoding()
        if not 0 <= position <= len(self._tokens):
            raise CacheError(f"expected a position in 0 to {len(self._tokens)}, got {position}")
        wanted = self._tokens[:position]
        new = wanted[self._reach(wanted) :]
        if new:
            self.prefill(new)
        return len(new)

    def match(self, ids: Sequence[int]) -> int:
        """Make the caches hold as much of the beginning of `ids` as they can without running a token,
        in any branch; the last id is always left to run. Returns how many of `ids` they hold then.
        """
        self._end_decoding()
        return self._reach(ids[:-1])

    def snapshot(self) -> None:
        """Take a snapshot here, so that `match` and `goto` can come back however much follows."""
        self._end_decoding()
        self._snapshots.take(self._tokens, len(self._tokens))

    def prefill(
        self, ids: Sequence[int], *, snapshot: int | None = None, progress: Progress | None = None
    ) -> mx.array:
        """Run ids behind what is held; return the logits [1, V] after the last. `progress` as `prefill`
        of generation/loop.py takes it.

        A snapshot is taken `snapshot` tokens into the ids, where the answer's turn begins say, and
        at multiples of 512 positions. If `progress` raises, the session holds what was done.

        Raises PromptError, before any work, for ids that the model or the context cannot take.
        """
        self._end_decoding()
        check_token_ids(ids, self.vocab_size)
        if (total := len(self._tokens) + len(ids)) > self.context:
            raise PromptError(f"{total} tokens do not fit the context of {self.context}")
        snapshots = self._snapshots
        if snapshots.enabled and snapshot is not None and 0 < snapshot < len(ids) - snapshots.spare:
            # So far back the caches could not look after a pass over all of it.
            self._run(ids[:snapshot], snapshot, progress, 0, len(ids))
            return self._run(ids[snapshot:], None, progress, snapshot, len(ids))
        return self._run(ids, snapshot, progress, 0, len(ids))

    def decode(self, logits: mx.array, sample: Sample, max_tokens: int) -> Generator[int]:
        """Yield ids as `decode` of generation/loop.py does; then the session holds all of them but the last,
        and has a snapshot there. Whatever else is asked of the session meanwhile ends it.
        """
        self._end_decoding()
        return self._decoding.begin(self._decode(logits, sample, max_tokens))

    def save(self) -> None:
        """Write what the caches hold to the session's files, so that `resume` can go on from there.

        Raises SessionError if the disk does not take it; what was saved before is then still whole.
        """
        files = self._with_files()
        self.snapshot()
        self._snapshots.save(files)

    def resume(self) -> None:
        """Hold what `save` wrote; nothing if there is nothing.

        Raises SessionError, with the reason, if it is not whole or not of this model and form of cache;
        the session is then empty.
        """
        files = self._with_files()
        self._forget()
        try:
            self._tokens = self._snapshots.resume(files)
        except BaseException:
            self._forget()
            raise

    # What follows expects that no answer is being decoded.

    def _with_files(self) -> SessionFiles:
        if self._files is None:
            raise SessionError("this session has no files: give it some")
        return self._files

    def _forget(self) -> None:
        self._end_decoding()
        self._start_anew()
        self._snapshots.clear()

    def _run(
        self, ids: Sequence[int], turn: int | None, progress: Progress | None, done_before: int, total: int
    ) -> mx.array:
        """`prefill` for a part of its ids, `done_before` of `total` having been run."""
        before = list(self._tokens)
        between = False  # between two passes the caches are whole

        def on_pass(done: int, _: int) -> None:
            nonlocal between
            self._tokens = [*before, *ids[:done]]
            self._snapshots.take_along(self._tokens, None if turn is None else len(before) + turn)
            if progress is not None:
                between = True
                progress(done_before + done, total)
                between = False

        try:
            return prefill(self._model, ids, self.caches, progress=on_pass)
        except BaseException:
            if not between:
                self._start_anew()  # MLX fails late: what the layers hold may never be there
            raise

    def _decode(self, logits: mx.array, sample: Sample, max_tokens: int) -> Generator[int]:
        before = list(self._tokens)
        said: list[int] = []
        steps = decode(self._model, logits, self.caches, sample, max_tokens)
        try:
            for token in steps:
                said.append(token)
                yield token
        except Exception:
            self._start_anew()
            raise
        finally:
            with self._changing():
                steps.close()
                self._settle([*before, *said])
                self._snapshots.take(self._tokens, len(self._tokens))

    def _reach(self, wanted: Sequence[int]) -> int:
        """Hold as much of `wanted` as costs no run; returns how much."""
        snapshots = self._snapshots
        while True:
            common = common_length(self._tokens, wanted)
            back = len(self._tokens) - common
            rewound = common if back <= min(cache.rewindable for cache in self.caches) else 0
            if rewound <= self._options.start and any(cache.quantized for cache in self.caches):
                rewound = 0  # a fresh run of so few tokens is not quantized
            reach, span = snapshots.nearest(wanted, beyond=self._options.start)
            try:
                with self._changing():
                    if max(reach, rewound) == 0:
                        snapshots.keep_full(0)
                        self._start_anew()
                    elif reach > rewound:
                        self._tokens = snapshots.restore(span)
                        self._back_to(reach)
                    else:
                        self._back_to(rewound)
            except SessionError:  # a damaged file costs the run of its tokens, no more
                continue
            return len(self._tokens)

    def _back_to(self, position: int) -> None:
        self._snapshots.keep_full(position)
        rewind(self.caches, len(self._tokens) - position)
        self._settle(self._tokens)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """If what is done within is broken off, hold nothing rather than something between."""
        try:
            yield
        except BaseException:
            self._start_anew()
            raise

    def _start_anew(self) -> None:
        self.caches = self._model.make_caches(self._options)
        self._tokens = []
        self._snapshots.follow(self.caches)

    def _settle(self, known: Sequence[int]) -> None:
        """After a run of `known` tokens that may have been cut short: hold what all layers hold of them."""
        end = min(len(known), *(cache.offset for cache in self.caches))
        with self._changing():
            for cache in self.caches:
                if cache.offset - end > cache.rewindable:
                    self._start_anew()
                    return
                cache.rewind(cache.offset - end)
            self._tokens = list(known[:end])
            self._snapshots.cut(end)

    def _end_decoding(self) -> None:
        """Close an answer that its reader left open: it uses these caches."""
        self._decoding.close()
        self._recover()

    def _recover(self) -> None:
        """Hold nothing if an interrupt, just where an answer ended, left the caches ahead of the tokens."""
        if any(cache.offset != len(self._tokens) for cache in self.caches):
            self._start_anew()
