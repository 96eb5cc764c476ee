"""A conversation's tokens and their caches, which can go back, and run only what is new.

Going back takes the nearest way: the caches rewind if they can; else the last checkpoint before is
restored, and what lies behind it runs again.
"""

from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from olmo3_mlx.blocks import FULL, SLIDING, BlockStore
from olmo3_mlx.cache import rewind
from olmo3_mlx.checkpoints import Checkpoints, same
from olmo3_mlx.errors import CacheError, OptionError, SessionError
from olmo3_mlx.generation import LanguageModel, Progress, Sample, decode, prefill
from olmo3_mlx.session_files import SessionFiles

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
        longest = model.config.max_position_embeddings
        self.context: int = longest if context is None else context
        if not 1 <= self.context <= longest or checkpoint_bytes < 0:
            raise OptionError(
                f"expected a context of 1 to {longest} tokens and 0 or more bytes for checkpoints, got "
                f"{context} and {checkpoint_bytes}"
            )
        self.vocab_size: int = model.config.vocab_size
        self._model = model
        self._make_caches = partial(model.make_caches, **caches)
        self._files = files
        self._checkpoints = Checkpoints(BlockStore(checkpoint_bytes, files))
        self._tokens: list[int] = []
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
    def checkpoint_bytes(self) -> int:
        """Bytes of the checkpoints in memory."""
        return self._checkpoints.store.nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._checkpoints.clear()
        self._start_anew()

    def goto(self, position: int) -> int:
        """Go back to where the first `position` tokens are held; returns how many of them had to run.

        Raises CacheError if there are not so many tokens.
        """
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
        return self._reach(ids[:-1])

    def checkpoint(self) -> None:
        """Make a checkpoint here, so that it can be gone back to however much follows."""
        self._checkpoints.mark(self._tokens, len(self._tokens))

    def prefill(
        self, ids: Sequence[int], *, checkpoint: int | None = None, progress: Progress | None = None
    ) -> mx.array:
        """Run ids behind what is held; return the logits [1, V] after the last. `progress` as `prefill`
        of generation.py takes it.

        A checkpoint is made `checkpoint` tokens into the ids, where the answer's turn begins say, and
        at multiples of 512 positions. If `progress` raises, the session holds what was done.
        """
        before = list(self._tokens)
        turn = None if checkpoint is None else len(before) + checkpoint
        between = False  # two passes: the caches are whole

        def passed(done: int, total: int) -> None:
            nonlocal between
            self._tokens = [*before, *ids[:done]]
            self._checkpoints.mark_all(self._tokens, turn)
            if progress is not None:
                between = True
                progress(done, total)
                between = False

        try:
            return prefill(self._model, ids, self.caches, progress=passed)
        except BaseException as error:
            if between or isinstance(error, KeyboardInterrupt):
                self._settle([*before, *ids])
            else:
                self._start_anew()  # MLX fails late: what the layers hold may never be there
            raise

    def decode(self, logits: mx.array, sample: Sample, max_tokens: int) -> Generator[int]:
        """Yield ids as `decode` of generation.py does; then the session holds all of them but the last,
        and has a checkpoint there.
        """
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
            steps.close()
            self._settle([*self._tokens, *said])
            self.checkpoint()

    def save(self) -> None:
        """Write what the caches hold to the session's files, so that `resume` can go on from there.

        Raises SessionError if the disk does not take it; what was saved before is then still whole.
        """
        assert self._files is not None, "a session without files cannot be saved"
        self.checkpoint()
        marks = self._checkpoints
        for block in marks.path:
            if (block.name, FULL) not in self._files:
                self._files.write(block, FULL, marks.full_part(block))
            if marks.capture(block) and (block.name, SLIDING) not in self._files:
                self._files.write(block, SLIDING, marks.store.get(block, SLIDING))
        self._files.commit(marks.path, marks.window(marks.last))

    def resume(self) -> None:
        """Hold what `save` wrote; nothing if there is nothing.

        Raises SessionError, with the reason, if it is not whole or not of this model and form of cache;
        the session is then empty, and the files are gone.
        """
        assert self._files is not None, "a session without files cannot resume"
        self.clear()
        marks = self._checkpoints
        block = marks.root
        try:
            for tokens, captured in self._files.chain():
                block = block.child(tokens)
                block.captured = captured
            if not marks.restorable(block):
                raise SessionError("files of the conversation's caches are missing")
            self._tokens = marks.restore(block)
        except SessionError:
            self.clear()
            self._files.clear()
            raise
        self._files.keep_only(marks.path, marks.window(block))

    def _reach(self, wanted: Sequence[int]) -> int:
        """Hold as much of `wanted` as costs no run; returns how much."""
        marks = self._checkpoints
        common = same(self._tokens, wanted)
        back = len(self._tokens) - common
        rewound = common if back <= min(cache.rewindable for cache in self.caches) else -1
        blocks = [marks.root, *marks.root.matching(wanted)]
        for block in sorted(blocks, key=lambda block: -block.stop):
            if block.stop <= rewound:
                marks.retire(common)
                rewind(self.caches, back)
                self._settle(self._tokens)
                break
            try:
                if marks.restorable(block):
                    self._tokens = marks.restore(block)
                    break
            except SessionError:  # a damaged file costs the run of its tokens, no more
                self._start_anew()
                rewound = -1
        return len(self._tokens)

    def _start_anew(self) -> None:
        self.caches = self._make_caches()
        self._checkpoints.follow(self.caches)
        self._tokens = []

    def _settle(self, known: Sequence[int]) -> None:
        """After a run of `known` tokens that may have been cut short: hold what all layers hold."""
        at = {cache.offset for cache in self.caches}
        if len(at) > 1:
            self._start_anew()
            return
        self._tokens = list(known[: at.pop()])
        self._checkpoints.cut(len(self._tokens))
