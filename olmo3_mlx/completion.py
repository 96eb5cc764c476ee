"""Text in, text out: a prompt or a conversation, answered whole (`generate`) or piece by piece
(`stream`).
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from olmo3_mlx.cache import Cache
from olmo3_mlx.chat_template import Message
from olmo3_mlx.config import GenerationConfig
from olmo3_mlx.errors import OptionError, PromptError
from olmo3_mlx.generation import PREFILL_CHUNK, Progress, check_prompt, decode, prefill
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


@dataclass(frozen=True)
class GenerationOptions:
    """How to answer. Checked when made; raises OptionError for values outside their range."""

    sampling: SamplingOptions
    max_tokens: int | None = None  # None: as many as the context takes
    stop: tuple[str, ...] = ()
    eos_token_ids: frozenset[int] = frozenset()
    prefill_chunk: int = PREFILL_CHUNK

    def __post_init__(self) -> None:
        for name in ("max_tokens", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, lambda n: n >= 1, "of at least 1", whole=True)
        StopStrings(self.stop)  # refuses an empty one

    @classmethod
    def over(
        cls,
        defaults: GenerationConfig,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> "GenerationOptions":
        """What is given, over the checkpoint's own defaults.

        A filter given to a checkpoint that is greedy by default asks for sampling: at temperature 1.
        """
        filtered = any(value is not None for value in (top_p, top_k, min_p))
        if temperature is None:
            temperature = defaults.temperature or (1.0 if filtered else 0.0)
        given: dict[str, Any] = {
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
        }
        values = {k: getattr(defaults, k) if v is None else v for k, v in given.items()}
        return cls(
            sampling=SamplingOptions(temperature=temperature, seed=seed, **values),
            max_tokens=defaults.max_new_tokens if max_tokens is None else max_tokens,
            stop=_stop_strings(stop),
            eos_token_ids=frozenset(defaults.eos_token_ids),
            prefill_chunk=prefill_chunk,
        )


def generate(
    model: Olmo3, tokenizer: Tokenizer, prompt: str | Sequence[Message], **options: Any
) -> Completion:
    """Answer `prompt` whole. Takes what `stream` takes, raises what it raises."""
    return join(stream(model, tokenizer, prompt, **options))


def stream(
    model: Olmo3,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    system: str | None = None,
    raw: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> Iterator[Completion]:
    """Answer `prompt` piece by piece, in whole characters; the last piece has a finish_reason.

    `prompt` is a user's text, or a list of messages (`role`, `content`) that ends where the
    assistant is to speak; `system` goes before it. Both pass through the checkpoint's chat template,
    `tools` (JSON schemas) too. With `raw` a text is continued as it stands.

    `max_tokens` left out means as many as the context takes; more than that ends there as well.
    `stop` is one string or several. The sampling options are those of SamplingOptions. What is left
    out comes from generation_config.json. `progress(done, total)` is called during prefill.

    Errors are raised by the call itself, before any work: OptionError, PromptError, TemplateError.
    """
    options = GenerationOptions.over(
        model.generation_config,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    ids = tokenizer.encode(_prompt_text(tokenizer, prompt, system, raw, tools))
    check_prompt(ids, model.config.vocab_size, model.config.max_position_embeddings)
    return answer(model, tokenizer, ids, model.make_caches(rewind=1), options, progress=progress)


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
    logits = prefill(model, ids, caches, chunk=options.prefill_chunk, progress=progress)
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
        prompt = [{"role": "user", "content": prompt}]
    elif not prompt:
        raise PromptError("the conversation is empty: expected at least one message")
    if system is not None:
        first = prompt[0]
        if isinstance(first, Mapping) and first.get("role") == "system":
            raise OptionError("expected one system message: give it as system or in the messages, not both")
        prompt = [{"role": "system", "content": system}, *prompt]
    return tokenizer.apply_chat_template(prompt, tools=tools)
