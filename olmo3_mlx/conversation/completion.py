"""Text in, text out: a prompt or a conversation, answered whole (`generate`) or piece by piece
(`stream`).
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast

import mlx.core as mx

from olmo3_mlx.conversation.messages import with_system
from olmo3_mlx.conversation.options import GenerationOptions, Options
from olmo3_mlx.errors import MemoryFitError, OptionError, PromptError
from olmo3_mlx.generation.loop import Progress, check_prompt
from olmo3_mlx.generation.sampling import Sampler
from olmo3_mlx.memory.machine import MemoryWatch, wired
from olmo3_mlx.model import Olmo3
from olmo3_mlx.sessions.session import Session
from olmo3_mlx.text.client_messages import Message, normalized
from olmo3_mlx.text.stop_strings import StopStrings
from olmo3_mlx.text.tokenizer import Tokenizer

_WATCHED = 16  # tokens between looks at the memory that is left
_MORE_MEMORY = "shorten the prompt, quantize the caches (kv_bits), or take a smaller model"


@dataclass(frozen=True)
class Completion:
    """An answer, or with `stream` the next piece of one.

    text               without the stop string or end token that ended it
    token_ids          the generated ids, the end token included
    prompt_tokens      tokens run before the answer; what a session held already is not run
    generation_tokens  tokens generated so far
    prompt_tps         prompt tokens per second, until the first token was there
    generation_tps     generated tokens per second after the first; 0 for a single one
    peak_memory        GB (1e9 bytes) that MLX held at most since the process began
    finish_reason      "stop" (an end token or stop string), "length" (max_tokens or the context) or
                       "memory" (the machine's would run out); None while the answer goes on
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    generation_tokens: int
    prompt_tps: float
    generation_tps: float
    peak_memory: float
    finish_reason: str | None


def generate(
    model: Olmo3,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    *,
    system: str | None = None,
    raw: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool = False,
    session: Session | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Completion:
    """Answer `prompt` whole. Takes what `stream` takes, raises what it raises."""
    pieces = stream(
        model,
        tokenizer,
        prompt,
        system=system,
        raw=raw,
        tools=tools,
        continue_final_message=continue_final_message,
        session=session,
        progress=progress,
        **options,
    )
    return join(pieces)


def stream(
    model: Olmo3,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    *,
    system: str | None = None,
    raw: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool = False,
    session: Session | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Iterator[Completion]:
    """Answer `prompt` piece by piece, in whole characters; the last piece has a finish_reason.

    `prompt` is a user's text, or a list of messages (`role`, `content`) that ends where the
    assistant is to speak; `system` goes before it. Both pass through the checkpoint's chat template,
    `tools` (JSON schemas) too. A conversation that ends with the assistant's message gets another one;
    with `continue_final_message` that message is gone on with instead, and the answer is what follows it.
    With `raw` a text is continued as it stands.

    A `session` remembers: of the prompt only what it does not hold runs, whatever was edited, added
    or left out since; and it holds the answer afterwards. It is the place to ask for quantized caches.

    `options` are max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed and stop, see
    Options; what is left out comes from generation_config.json. `progress(done, total)` counts the
    tokens that are read of those that must be: it is called before the first pass, and after each.

    Errors are raised by the call itself, before any work: OptionError, PromptError, TemplateError; only
    that memory runs out while the prompt is read (MemoryFitError) shows later.
    """
    if session is not None and not isinstance(session, Session):
        raise OptionError(f"session must be a Session or None, not {session!r}")
    checked = GenerationOptions.of(model, tokenizer, **options)
    text, opening = _prompt_text(
        tokenizer, prompt, system=system, raw=raw, tools=tools, continued=continue_final_message
    )
    session = session or Session(model, rewind=1, snapshot_bytes=0)
    return answer(session, tokenizer, text, opening, checked, progress=progress)


def answer(
    session: Session,
    tokenizer: Tokenizer,
    prompt: str,
    opening: str,
    options: GenerationOptions,
    *,
    progress: Progress | None = None,
) -> Generator[Completion]:
    """Answer a prompt's text, which ends with the template's `opening` of the assistant's turn.

    Raises PromptError, before any work; reading a prompt for which memory does not suffice ends with
    MemoryFitError, and the session holds what was read. When the answer ends, or is closed, the session
    holds all of it but the last id.
    """
    ids = tokenizer.encode_like(prompt, session.tokens)
    check_prompt(ids, session.vocab_size, session.context)
    begins = len(ids) - len(tokenizer.encode(opening))
    watch = MemoryWatch()

    def memory_is_short() -> bool:
        """Whether memory runs out, though the snapshots were let go."""
        if not watch.exhausted(session.growth):
            return False
        session.drop_snapshots()
        return watch.exhausted(session.growth)

    return _answer(
        session, tokenizer, ids, options, begins=begins, memory_is_short=memory_is_short, progress=progress
    )


def _answer(
    session: Session,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    options: GenerationOptions,
    *,
    begins: int,
    memory_is_short: Callable[[], bool],
    progress: Progress | None,
) -> Generator[Completion]:
    """The answer to `ids`, the first `begins` of which are what was said before it."""
    held = session.match(ids)
    room = session.context - len(ids)
    limit = room if options.max_tokens is None else min(options.max_tokens, room)
    sampler = Sampler(options.sampling, ids)
    clock = _Clock(len(ids) - held)
    detokenizer, stops = tokenizer.detokenizer(), StopStrings(options.stop)

    def on_pass(done: int, total: int) -> None:
        if done < total and memory_is_short():
            raise MemoryFitError(f"memory would run out after {done} of {total} tokens: {_MORE_MEMORY}")
        if progress is not None:
            progress(done, total)

    if progress is not None:
        progress(0, len(ids) - held)
    with wired():
        logits = session.prefill(ids[held:], snapshot=begins - held, progress=on_pass)
        tokens = session.decode(logits, sampler, limit)
        try:
            for token in tokens:
                clock.tick()
                ended = token in options.eos_token_ids
                text = stops.add("" if ended else detokenizer.add(token))
                reason = "stop" if ended or stops.found else None
                if reason is None and clock.generated == limit:
                    reason = "length"
                if reason is None and clock.generated % _WATCHED == 0 and memory_is_short():
                    reason = "memory"
                if reason and not stops.found:
                    text += stops.add(detokenizer.finish()) + stops.finish()
                    reason = "stop" if stops.found else reason
                yield clock.piece(text, token, reason)
                if reason:
                    return
        finally:
            tokens.close()


def join(pieces: Iterator[Completion]) -> Completion:
    """The whole answer that a stream's pieces make."""
    texts: list[str] = []
    ids: list[int] = []
    last = None
    for last in pieces:
        texts.append(last.text)
        ids += last.token_ids
    assert last is not None, "a stream has at least one piece"
    return replace(last, text="".join(texts), token_ids=tuple(ids))


class _Clock:
    """Counts and times one answer."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.generated = 0
        self._begin = self._first = self._now = time.perf_counter()

    def tick(self) -> None:
        """A token is there."""
        self.generated += 1
        self._now = time.perf_counter()
        if self.generated == 1:
            self._first = self._now

    def piece(self, text: str, token: int, finish_reason: str | None) -> Completion:
        decoding = self._now - self._first
        return Completion(
            text=text,
            token_ids=(token,),
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generated,
            prompt_tps=self.prompt_tokens / max(self._first - self._begin, 1e-9),
            generation_tps=(self.generated - 1) / decoding if decoding > 0 else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
        )


def _prompt_text(
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    *,
    system: str | None,
    raw: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    continued: bool,
) -> tuple[str, str]:
    """The prompt, and the part of it that opens the answer."""
    if raw:
        if not isinstance(prompt, str) or system is not None or tools is not None or continued:
            raise OptionError(
                "raw takes a text to continue; system, tools and messages need the chat template"
            )
        return prompt, ""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise PromptError("the prompt is empty: expected a text")
        messages: Sequence[Message] = [{"role": "user", "content": prompt}]
    elif not isinstance(prompt, Sequence) or not prompt:
        raise PromptError(f"the conversation is empty, or none: expected messages, got {prompt!r}")
    else:
        messages = normalized(cast(Sequence[Message], prompt))
    return rendered(tokenizer, with_system(messages, system), tools, continued=continued)


def rendered(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    continued: bool = False,
) -> tuple[str, str]:
    """The prompt that the chat template makes of a conversation, and what of it opens the answer: if the last
    message is `continued`, also that.

    Raises TemplateError.
    """
    prompt = tokenizer.apply_chat_template(messages, tools=tools, continue_final_message=continued)
    before = messages[:-1] if continued else messages
    so_far = tokenizer.apply_chat_template(before, tools=tools, add_generation_prompt=False) if before else ""
    return prompt, prompt.removeprefix(so_far) if prompt.startswith(so_far) else ""
