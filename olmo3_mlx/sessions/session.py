"""A conversation's tokens and their caches, which can go back, and run only what is new.

Going back takes the nearest way: the caches rewind, or a checkpoint is restored, and what is missing runs.
"""

import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx

from olmo3_mlx.caches.cache import rewind
from olmo3_mlx.errors import CacheError, OptionError, PromptError, SessionError
from olmo3_mlx.generation.loop import LanguageModel, Progress, Sample, check_ids, decode, prefill
from olmo3_mlx.sessions.files import SessionFiles
from olmo3_mlx.sessions.snapshots import Checkpoints
from olmo3_mlx.sessions.spans import FULL, SLIDING, BlockStore, same

CHECKPOINT_BYTES = 2**31  # of checkpoints in memory, unless told


class Session:
    """Tokens, and caches that hold them. Knows ids and a model, no text."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        context: int | None = None,
        checkpoint_bytes: int = CHECKPOINT_BYTES,
        files: SessionFiles | None = None,
        **caches: Any,
    ) -> None:
        """A session for at most `context` tokens, as many as the model takes unless given. `caches` are
        the arguments of `model.make_caches`. Checkpoints take at most `checkpoint_bytes` of memory; the
        least recently used go beyond that, to `files` if there are any.

        Raises OptionError for a value outside its range.
        """
        longest: int = model.config.max_position_embeddings
        context = longest if context is None else context
        for name, value, least, most in (
            ("context", context, 1, longest),
            ("checkpoint_bytes", checkpoint_bytes, 0, 2**63),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise OptionError(f"{name} must be a whole number from {least} to {most}, not {value!r}")
        self.context = context
        self.vocab_size: int = model.config.vocab_size
        self._model = model
        self._make_caches = partial(model.make_caches, **caches)
        self._kv_start: int = caches.get("kv_start", 0)
        self._files = files
        self._checkpoints = Checkpoints(BlockStore(checkpoint_bytes, files))
        self._tokens: list[int] = []
        self._decoding: weakref.ref[Generator[int]] | None = None
        self._start_anew()

    @property
    def tokens(self) -> Sequence[int]:
        """What the caches hold."""
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
    def checkpoint_bytes(self) -> int:
        """Bytes of the checkpoints in memory."""
        return self._checkpoints.store.nbytes

    def clear(self) -> None:
        """Forget everything, on disk too."""
        self._forget()
        if self._files is not None:
            self._files.clear()

    def release(self) -> None:
        """Let the checkpoints in memory go."""
        self._checkpoints.store.clear()

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

    def checkpoint(self) -> None:
        """Make a checkpoint here, so that it can be gone back to however much follows."""
        self._end_decoding()
        self._checkpoints.mark(self._tokens, len(self._tokens))

    def prefill(
        self, ids: Sequence[int], *, checkpoint: int | None = None, progress: Progress | None = None
    ) -> mx.array:
        """Run ids behind what is held; return the logits [1, V] after the last. `progress` as `prefill`
        of generation.py takes it.

        A checkpoint is made `checkpoint` tokens into the ids, where the answer's turn begins say, and
        at multiples of 512 positions. If `progress` raises, the session holds what was done.

        Raises PromptError, before any work, for ids that the model or the context cannot take.
        """
        self._end_decoding()
        check_ids(ids, self.vocab_size)
        if (total := len(self._tokens) + len(ids)) > self.context:
            raise PromptError(f"{total} tokens do not fit the context of {self.context}")
        marks = self._checkpoints
        if marks.kept and checkpoint is not None and 0 < checkpoint < len(ids) - marks.spare:
            # So far back the caches could not look after a pass over all of it.
            self._run(ids[:checkpoint], checkpoint, progress, 0, len(ids))
            return self._run(ids[checkpoint:], None, progress, checkpoint, len(ids))
        return self._run(ids, checkpoint, progress, 0, len(ids))

    def decode(self, logits: mx.array, sample: Sample, max_tokens: int) -> Generator[int]:
        """Yield ids as `decode` of generation.py does; then the session holds all of them but the last,
        and has a checkpoint there. Whatever else is asked of the session meanwhile ends it.
        """
        self._end_decoding()
        ids = self._decode(logits, sample, max_tokens)
        self._decoding = weakref.ref(ids)
        return ids

    def save(self) -> None:
        """Write what the caches hold to the session's files, so that `resume` can go on from there.

        Raises SessionError if the disk does not take it; what was saved before is then still whole.
        """
        marks, files = self._checkpoints, self._with_files()
        self.checkpoint()
        files.need(marks.path, marks.path)
        for block in marks.path:
            if (block.name, FULL) not in files:
                files.write(block, FULL, marks.full_part(block))
            held = marks.capture(block) or marks.store.peek(block, SLIDING)
            if held is not None and (block.name, SLIDING) not in files:
                files.write(block, SLIDING, held)
        files.commit(marks.path, marks.window(marks.last))

    def resume(self) -> None:
        """Hold what `save` wrote; nothing if there is nothing.

        Raises SessionError, with the reason, if it is not whole or not of this model and form of cache;
        the session is then empty.
        """
        marks, files = self._checkpoints, self._with_files()
        self._forget()
        block = marks.root
        try:
            for tokens, captured in files.chain():
                block = block.child(tokens)
                block.captured = captured
            if (block.stop, block) not in marks.nearest(block.ids()):
                raise SessionError("files of the conversation's caches are missing")
            self._tokens = marks.restore(block)
        except BaseException:
            self._forget()
            raise
        files.keep_only(marks.path, marks.window(block))

    # What follows expects that no answer is being decoded.

    def _with_files(self) -> SessionFiles:
        if self._files is None:
            raise SessionError("this session was made without files")
        return self._files

    def _forget(self) -> None:
        self._end_decoding()
        self._start_anew()
        self._checkpoints.clear()

    def _run(
        self, ids: Sequence[int], turn: int | None, progress: Progress | None, done_before: int, total: int
    ) -> mx.array:
        """`prefill` for a part of its ids, `done_before` of `total` having been run."""
        before = list(self._tokens)
        between = False  # two passes: the caches are whole

        def passed(done: int, _: int) -> None:
            nonlocal between
            self._tokens = [*before, *ids[:done]]
            self._checkpoints.mark_all(self._tokens, None if turn is None else len(before) + turn)
            if progress is not None:
                between = True
                progress(done_before + done, total)
                between = False

        try:
            return prefill(self._model, ids, self.caches, progress=passed)
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
                self._decoding = None
                self._settle([*before, *said])
                self._checkpoints.mark(self._tokens, len(self._tokens))

    def _reach(self, wanted: Sequence[int]) -> int:
        """Hold as much of `wanted` as costs no run; returns how much."""
        marks = self._checkpoints
        while True:
            common = same(self._tokens, wanted)
            back = len(self._tokens) - common
            rewound = common if back <= min(cache.rewindable for cache in self.caches) else 0
            if rewound <= self._kv_start and any(cache.quantized for cache in self.caches):
                rewound = 0  # a fresh run of so few tokens is not quantized
            reach, block = next(
                ((reach, block) for reach, block in marks.nearest(wanted) if reach > self._kv_start),
                (0, marks.root),
            )
            try:
                with self._changing():
                    if max(reach, rewound) == 0:
                        marks.retire(0)
                        self._start_anew()
                    elif reach > rewound:
                        self._tokens = marks.restore(block)
                        self._back_to(reach)
                    else:
                        self._back_to(rewound)
            except SessionError:  # a damaged file costs the run of its tokens, no more
                continue
            return len(self._tokens)

    def _back_to(self, position: int) -> None:
        self._checkpoints.retire(position)
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
        self.caches = self._make_caches()
        self._tokens = []
        self._checkpoints.follow(self.caches)

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
            self._checkpoints.cut(end)

    def _end_decoding(self) -> None:
        """Close an answer that its reader left open: it uses these caches."""
        ids = self._decoding() if self._decoding is not None else None
        if ids is not None:
            ids.close()
