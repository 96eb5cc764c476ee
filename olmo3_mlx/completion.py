"""Text in, text out: a prompt or a conversation, answered whole (`generate`) or piece by piece
(`stream`).
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack, cast

import mlx.core as mx

from olmo3_mlx.cache import Cache
from olmo3_mlx.chat_template import Message
from olmo3_mlx.config import GenerationConfig
from olmo3_mlx.errors import OptionError, PromptError
from olmo3_mlx.generation import Progress, check_prompt, decode, prefill
from olmo3_mlx.model import Olmo3
from olmo3_mlx.sampling import Sampler, SamplingOptions, check_number
from olmo3_mlx.stop import StopStrings
from olmo3_mlx.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """An answer, or with `stream` the next piece of one.

    text               without the stop string or end token that ended it
    token_ids          the generated ids, the end token included
    prompt_tokens      tokens run before the answer
    generation_tokens  tokens generated so far
    prompt_tps         prompt tokens per second, until the first token was there
    generation_tps     generated tokens per second after the first; 0 for a single one
    peak_memory        GB (1e9 bytes) that MLX held at most since the process began
    finish_reason      "stop" (an end token or stop string) or "length" (max_tokens or the context);
                       None while the answer goes on
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    generation_tokens: int
    prompt_tps: float
    generation_tps: float
    peak_memory: float
    finish_reason: str | None


class Options(TypedDict, total=False):
    """How to answer, as `stream`, `generate` and Chat take it by keyword. None is as good as left out:
    the checkpoint's generation_config.json decides.

    max_tokens  end after so many; as many as the context takes if nothing says otherwise
    stop        end before this text, or one of these
    the others  see SamplingOptions
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None


@dataclass(frozen=True)
class GenerationOptions:
    """How to answer, decided. Checked when made; raises OptionError for values outside their range."""

    sampling: SamplingOptions
    max_tokens: int | None = None  # None: as many as the context takes
    stop: tuple[str, ...] = ()
    eos_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_number("max_tokens", self.max_tokens, lambda n: n >= 1, "of at least 1", whole=True)
        StopStrings(self.stop)  # refuses an empty one

    @classmethod
    def over(
        cls,
        defaults: GenerationConfig,
        **options: Unpack[Options],
    ) -> "GenerationOptions":
        """What is given, over the checkpoint's own defaults.

        A filter given to a checkpoint that is greedy by default asks for sampling: at temperature 1.
        """
        unknown = sorted(options.keys() - Options.__annotations__.keys())
        if unknown:
            raise TypeError(f"unknown option {unknown[0]}: expected {', '.join(Options.__annotations__)}")
        given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
        stop = given.pop("stop", defaults.stop_strings)
        max_tokens = given.pop("max_tokens", defaults.max_new_tokens)
        filters = ("top_p", "top_k", "min_p")
        if not defaults.temperature and any(key in given for key in filters):
            given.setdefault("temperature", 1.0)
        for key in ("temperature", "repetition_penalty", *filters):
            given.setdefault(key, getattr(defaults, key))
        return cls(
            sampling=SamplingOptions(**given),
            max_tokens=max_tokens,
            stop=_stop_strings(stop),
            eos_token_ids=frozenset(defaults.eos_token_ids),
        )


def generate(
    model: Olmo3,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    *,
    system: str | None = None,
    raw: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Completion:
    """Answer `prompt` whole. Takes what `stream` takes, raises what it raises."""
    return join(
        stream(model, tokenizer, prompt, system=system, raw=raw, tools=tools, progress=progress, **options)
    )


def stream(
    model: Olmo3,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    *,
    system: str | None = None,
    raw: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Iterator[Completion]:
    """Answer `prompt` piece by piece, in whole characters; the last piece has a finish_reason.

    `prompt` is a user's text, or a list of messages (`role`, `content`) that ends where the
    assistant is to speak; `system` goes before it. Both pass through the checkpoint's chat template,
    `tools` (JSON schemas) too. With `raw` a text is continued as it stands.

    `options` are max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed and stop, see
    Options; what is left out comes from generation_config.json. `progress(done, total)` is called
    during prefill.

    Errors are raised by the call itself, before any work: OptionError, PromptError, TemplateError.
    """
    checked = GenerationOptions.over(model.generation_config, **options)
    ids = tokenizer.encode(_prompt_text(tokenizer, prompt, system, raw, tools))
    check_prompt(ids, model.config.vocab_size, model.config.max_position_embeddings)
    return answer(model, tokenizer, ids, model.make_caches(rewind=1), checked, progress=progress)


def answer(
    model: Olmo3,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    caches: list[Cache],
    options: GenerationOptions,
    *,
    seen: Sequence[int] = (),
    progress: Progress | None = None,
) -> Generator[Completion]:
    """Run `ids` (checked) after what `caches` hold, and stream the answer.

    When it ends, or is closed, the caches hold all generated ids but the last. `seen` are the ids
    that the caches hold already, for the repetition penalty.
    """
    held = caches[0].offset
    room = model.config.max_position_embeddings - held - len(ids)
    limit = room if options.max_tokens is None else min(options.max_tokens, room)
    sampler = Sampler(options.sampling, [*seen, *ids])
    clock = _Clock(len(ids))
    detokenizer, stops = tokenizer.detokenizer(), StopStrings(options.stop)
    logits = prefill(model, ids, caches, progress=progress)
    tokens = decode(model, logits, caches, sampler, limit)
    try:
        for token in tokens:
            clock.tick()
            ended = token in options.eos_token_ids
            text = stops.add("" if ended else detokenizer.add(token))
            reason = "stop" if ended or stops.found else None
            if reason is None and clock.generated == limit:
                reason = "length"
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


def _stop_strings(stop: object) -> tuple[str, ...]:
    strings = [stop] if isinstance(stop, str) else stop or ()
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) for s in strings):
        raise OptionError(f"stop must be a string or a list of strings, not {stop!r}")
    return tuple(strings)


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
    system: str | None,
    raw: bool,
    tools: Sequence[Mapping[str, Any]] | None,
) -> str:
    if raw:
        if not isinstance(prompt, str) or system is not None or tools is not None:
            raise OptionError(
                "raw takes a text to continue; system, tools and messages need the chat template"
            )
        return prompt
    if isinstance(prompt, str):
        if not prompt.strip():
            raise PromptError("the prompt is empty: expected a text")
        messages: Sequence[Message] = [{"role": "user", "content": prompt}]
    elif not isinstance(prompt, Sequence) or not prompt:
        raise PromptError(f"the conversation is empty, or none: expected messages, got {prompt!r}")
    else:
        messages = cast(Sequence[Message], prompt)
    if system is not None:
        first = messages[0]
        if isinstance(first, Mapping) and first.get("role") == "system":
            raise OptionError("expected one system message: give it as system or in the messages, not both")
        messages = [{"role": "system", "content": system}, *messages]
    return tokenizer.apply_chat_template(messages, tools=tools)
