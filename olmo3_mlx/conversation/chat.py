"""A conversation that keeps its caches between turns and runs only what is new."""

import re
from collections.abc import Generator, Sequence
from typing import Unpack

from olmo3_mlx.conversation.completion import Completion, answer, rendered
from olmo3_mlx.conversation.messages import system_message, with_system
from olmo3_mlx.conversation.options import GenerationOptions, Options
from olmo3_mlx.errors import PromptError
from olmo3_mlx.generation.loop import Progress
from olmo3_mlx.generation.unfinished import Unfinished
from olmo3_mlx.model import Olmo3
from olmo3_mlx.sessions.session import Session
from olmo3_mlx.text.client_messages import Message, normalized
from olmo3_mlx.text.tokenizer import Tokenizer


class Chat:
    """One conversation. `messages` is what was said, `role` and `content` each.

    Each turn renders the whole conversation; the session runs what it does not hold. Templates end
    the last assistant turn with <|endoftext|> and every earlier one with <|im_end|>, so the end token
    that the model gave is no part of what the session holds. The ids that the model chose stay as they are.
    """

    def __init__(
        self,
        model: Olmo3,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        messages: Sequence[Message] | None = None,
        session: Session | None = None,
        **options: Unpack[Options],
    ) -> None:
        """`options` are those of `stream`, for every turn. `messages` were said before, a system message
        included. A `session` of one's own decides on the form of its caches, the context, and how much
        memory going back may take.

        Raises OptionError for one outside its range, TemplateError if there is no chat template.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.options = GenerationOptions.of(model, tokenizer, **options)
        self.session = session or Session(model)
        self._answering = Unfinished()
        tokenizer.check_chat_template()
        self.messages: list[Message] = with_system(normalized(messages or ()), system)

    @property
    def system(self) -> str | None:
        """The system message, which `reset` keeps; None if the template has its own."""
        return system_message(self.messages)

    def reset(self, system: str | None = None) -> None:
        """Forget what was said; `system` replaces the system message if it is given."""
        self._answering.close()
        self.messages = with_system((), self.system if system is None else system)
        self.session.clear()

    @property
    def tokens(self) -> int:
        """Tokens that the caches hold."""
        return len(self.session.tokens)

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches take."""
        return self.session.nbytes

    def send(self, text: str, *, progress: Progress | None = None) -> Generator[Completion]:
        """Say something; stream the answer. `prompt_tokens` counts what was run, not what was reused.

        Closing the stream early keeps what was said so far. Raises PromptError, with the
        conversation as it was, if the text is empty or the conversation outgrows the context.
        """
        self._answering.close()
        return self._send(text, self.messages, progress)

    def edit(self, text: str, *, progress: Progress | None = None) -> Generator[Completion]:
        """Say something else instead of the last message; stream the answer to that.

        The last turn goes when the answer begins. Raises PromptError as `send` does, and if nothing was
        said yet.
        """
        self._answering.close()
        return self._send(text, self._before_last_turn(), progress)

    def retry(self, *, progress: Progress | None = None) -> Generator[Completion]:
        """Answer the last message anew. Raises PromptError if nothing was said yet."""
        self._answering.close()
        before = self._before_last_turn()
        return self._send(self.messages[len(before)]["content"], before, progress)

    def undo(self) -> None:
        """Take the last message and its answer back. Raises PromptError if nothing was said yet."""
        self._answering.close()
        self.messages = self._before_last_turn()

    def _send(self, text: str, before: list[Message], progress: Progress | None) -> Generator[Completion]:
        if not isinstance(text, str) or not text.strip():
            raise PromptError("nothing to send: expected a text")
        messages = [*before, {"role": "user", "content": text}]
        prompt, opening = rendered(self.tokenizer, messages)
        pieces = answer(self.session, self.tokenizer, prompt, opening, self.options, progress=progress)
        return self._answering.begin(self._kept(pieces, messages, opening))

    def _kept(
        self, pieces: Generator[Completion], messages: list[Message], opening: str
    ) -> Generator[Completion]:
        """The pieces; when they end, the conversation has the turn."""
        said: list[str] = []
        try:
            for piece in pieces:
                said.append(piece.text)
                yield piece
        finally:
            pieces.close()
            if said:
                thinking = re.search(r"(<think>\s*)?$", opening)  # the template's part of the answer
                assert thinking is not None
                self.messages = [*messages, {"role": "assistant", "content": thinking[0] + "".join(said)}]

    def _before_last_turn(self) -> list[Message]:
        last = max((i for i, m in enumerate(self.messages) if m["role"] == "user"), default=None)
        if last is None:
            raise PromptError("nothing was said yet: expected a message to go back to")
        return self.messages[:last]
