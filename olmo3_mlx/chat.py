"""A conversation that keeps its caches between turns and runs only what is new."""

import re
import weakref
from collections.abc import Generator, Sequence
from typing import Any, Unpack

from olmo3_mlx.cache import Cache, rewind
from olmo3_mlx.completion import Completion, GenerationOptions, Options, answer
from olmo3_mlx.errors import PromptError
from olmo3_mlx.generation import Progress, check_prompt
from olmo3_mlx.model import Olmo3
from olmo3_mlx.tokenizer import Tokenizer


class Chat:
    """One conversation. `messages` is what was said, `role` and `content` each.

    Templates end the last assistant turn with <|endoftext|> and every earlier one with <|im_end|>,
    so the end token that the model gave is not part of the caches: what the template puts behind an
    answer now is run with the next turn. The ids that the model chose stay as they are; text is only
    tokenized once.
    """

    def __init__(
        self,
        model: Olmo3,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        """`options` are those of `stream`, for every turn.

        Raises OptionError for one outside its range, TemplateError if there is no chat template.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.options = GenerationOptions.over(model.generation_config, **options)
        self.system = system
        self._caches: list[Cache] = []
        self._held: list[int] = []  # the ids in the caches
        self._text = ""  # and their text
        # Weak, so that a reader who breaks off closes the answer at once.
        self._answering: weakref.ref[Generator[Completion]] | None = None
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])  # is there one?
        self.reset()

    def reset(self, system: str | None = None) -> None:
        """Forget what was said; `system` replaces the system message if it is given."""
        self._close_answer()
        self.system = self.system if system is None else system
        self.messages: list[dict[str, Any]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self._forget_caches()

    @property
    def tokens(self) -> int:
        """Tokens that the caches hold."""
        return len(self._held)

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches take."""
        return sum(cache.nbytes for cache in self._caches)

    def send(self, text: str, *, progress: Progress | None = None) -> Generator[Completion]:
        """Say something; stream the answer. `prompt_tokens` counts what was run, not what was reused.

        Closing the stream early keeps what was said so far. Raises PromptError, with the
        conversation as it was, if the text is empty or the conversation outgrows the context.
        """
        if not isinstance(text, str) or not text.strip():
            raise PromptError("nothing to send: expected a text")
        self._close_answer()
        turn = {"role": "user", "content": text}
        prompt = self.tokenizer.apply_chat_template([*self.messages, turn])
        new = self._new_ids(prompt)
        config = self.model.config
        check_prompt(new, config.vocab_size, config.max_position_embeddings, self.tokens)
        pieces = self._answer(turn, prompt, new, progress)
        self._answering = weakref.ref(pieces)
        return pieces

    def _answer(
        self, turn: dict[str, Any], prompt: str, new: Sequence[int], progress: Progress | None
    ) -> Generator[Completion]:
        said: list[str] = []
        ids: list[int] = []
        pieces = answer(
            self.model,
            self.tokenizer,
            new,
            self._caches,
            self.options,
            seen=self._held,
            progress=progress,
        )
        try:
            for piece in pieces:
                said.append(piece.text)
                ids += piece.token_ids
                yield piece
        except GeneratorExit:
            pieces.close()
            raise
        except BaseException as error:
            self._recover(new if isinstance(error, KeyboardInterrupt) and not ids else [])
            raise
        finally:
            if ids:
                self._remember(turn, prompt, new, "".join(said), ids)

    def _remember(
        self, turn: dict[str, Any], prompt: str, new: Sequence[int], said: str, ids: Sequence[int]
    ) -> None:
        opened = re.search(r"(<think>\s*)?$", prompt)  # the template's part of the answer
        assert opened is not None
        self.messages += [turn, {"role": "assistant", "content": opened[0] + said}]
        if not self._caches[0].offset:
            return
        self._held += [*new, *ids[:-1]]
        self._text = prompt + self.tokenizer.decode(ids[:-1])

    def _recover(self, running: Sequence[int]) -> None:
        """After an exception: keep what was read of `running`, if all layers agree where that is."""
        at = {cache.offset for cache in self._caches}
        known = [*self._held, *running]
        if not running or len(at) > 1:
            self._forget_caches()
            return
        del known[at.pop() :]
        self._held = known
        self._text = self.tokenizer.decode(self._held)

    def _new_ids(self, prompt: str) -> list[int]:
        """The ids to run for `prompt`, after making the caches hold just what comes before them."""
        if self._held and prompt.startswith(self._text):
            return self.tokenizer.encode(prompt[len(self._text) :])
        ids = self.tokenizer.encode(prompt)
        same = next(
            (i for i, (a, b) in enumerate(zip(ids, self._held, strict=False)) if a != b),
            min(len(ids), len(self._held)),
        )
        back = len(self._held) - min(same, len(ids) - 1)
        if back > min(cache.rewindable for cache in self._caches):
            self._forget_caches()
            return ids
        rewind(self._caches, back)
        del self._held[len(self._held) - back :]
        self._text = self.tokenizer.decode(self._held)
        return ids[len(self._held) :]

    def _close_answer(self) -> None:
        """End an answer that its reader left open: it uses these caches."""
        pieces = self._answering() if self._answering is not None else None
        if pieces is not None:
            pieces.close()
        self._answering = None

    def _forget_caches(self) -> None:
        self._caches = self.model.make_caches()
        self._held = []
        self._text = ""
