"""generate and stream: with the demo model, and with a scripted one where exactness matters."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from olmo3_mlx import (
    CacheOptions,
    Completion,
    ConfigError,
    GenerationConfig,
    KVCache,
    MemoryFitError,
    Olmo3,
    Olmo3Error,
    OptionError,
    PromptError,
    RotatingKVCache,
    Session,
    TemplateError,
    Tokenizer,
    generate,
    stream,
)
from olmo3_mlx.caches.attention import KeysValues
from olmo3_mlx.caches.cache import Cache
from olmo3_mlx.conversation.options import GenerationOptions
from olmo3_mlx.generation.sampling import SamplingOptions
from olmo3_mlx.memory.machine import MemoryWatch

Script = Callable[[list[int]], int]  # all ids so far -> the next one
ENDOFTEXT, IM_END = 8188, 8190  # the demo tokenizer's end tokens
BOTH_ENDS = GenerationConfig((IM_END, ENDOFTEXT))


def ids_in(keys: mx.array) -> list[int]:
    """A scripted model's keys [1, 1, S, 1] are ids."""
    return [int(key) for key in np.array(keys[0, 0, :, 0])]


@dataclass
class ScriptedModel:
    """A model whose next token is a function of the ids that its caches hold: they are the keys."""

    script: Script
    context: int = 4096
    generation_config: GenerationConfig = BOTH_ENDS
    window: int = 4096
    rewind: int | None = None  # None: what the caller asks for
    prompts: list[list[int]] = field(default_factory=list)  # what the caches held when an answer began
    calls: int = 0
    on_call: Callable[["ScriptedModel", int], None] = lambda model, length: None

    def __post_init__(self) -> None:
        self.config: Any = SimpleNamespace(vocab_size=8192, max_position_embeddings=self.context)

    def make_caches(self, options: CacheOptions | None = None) -> list[Cache]:
        rewind = (options or CacheOptions()).rewind if self.rewind is None else self.rewind
        return [KVCache(), RotatingKVCache(self.window, rewind)]

    def __call__(
        self,
        tokens: mx.array,
        caches: list[Cache],
        *,
        logits_to_keep: int | None = None,
        checked: bool = False,
    ) -> mx.array:
        self.calls += 1
        self.on_call(self, tokens.shape[1])
        keys = tokens[:, None, :, None].astype(mx.float32)
        seen = caches[0].append(keys, keys)
        assert isinstance(seen, KeysValues)
        history = ids_in(seen.keys)
        caches[1].append(keys, keys)
        assert caches[0].offset == caches[1].offset
        if tokens.shape[1] > 1:
            self.prompts.append(history)
        return mx.where(mx.arange(8192) == self.script(history), 10.0, 0.0)[None, None]


def held_ids(caches: Sequence[Any]) -> list[int]:
    """The ids that a scripted model's caches hold."""
    return ids_in(caches[0].state[0][:, :, : caches[0].offset])


def saying(tokenizer: Tokenizer, *answers: Sequence[int] | str) -> Script:
    """Give the n-th answer after the n-th opening of the assistant's turn, "." ever after."""
    opening = tokenizer.encode("<|im_start|>assistant\n")
    filler = tokenizer.encode(".")[0]
    texts = [tokenizer.encode(a) if isinstance(a, str) else list(a) for a in answers]

    def script(history: list[int]) -> int:
        n = len(opening)
        begins = [i + n for i in range(len(history) - n + 1) if history[i : i + n] == opening]
        said = texts[len(begins) - 1][len(history) - begins[-1] :] if begins else []
        return said[0] if said else filler

    return script


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text's ids, one a character."""
    return [token for character in text for token in tokenizer.encode(character)]


@pytest.fixture(scope="module")
def tokenizer(demo: tuple[Olmo3, Tokenizer]) -> Tokenizer:
    return demo[1]


def run(model: ScriptedModel, tokenizer: Tokenizer, prompt: Any = "Hi", **options: Any) -> list[Completion]:
    """The pieces of a scripted answer."""
    return list(stream(model, tokenizer, prompt, **options))  # type: ignore[arg-type]


def text_of(pieces: Sequence[Completion]) -> str:
    return "".join(piece.text for piece in pieces)


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("named", [(), (IM_END,), (ENDOFTEXT,), (IM_END, ENDOFTEXT)])
def test_an_answer_ends_at_the_tokenizers_end_token_whatever_the_configs_name(
    tokenizer: Tokenizer, named: tuple[int, ...]
) -> None:
    """As fine-tunes have it whose configs name none, or only <|im_end|>."""
    model = ScriptedModel(saying(tokenizer, "yes<|endoftext|>no"), generation_config=GenerationConfig(named))
    answer = run(model, tokenizer, max_tokens=20)
    assert (text_of(answer), answer[-1].finish_reason) == ("yes", "stop")
    nameless = Tokenizer(tokenizer.backend, tokenizer.chat_template)
    ends = ENDOFTEXT in named
    assert (run(model, nameless, max_tokens=20)[-1].finish_reason == "stop") == ends


# The demo


def test_the_demo_adds_two_numbers(demo: tuple[Olmo3, Tokenizer]) -> None:
    answer = generate(*demo, "What is 17 + 25?", temperature=0)
    assert answer.text == "17 + 25 = 42"
    assert answer.finish_reason == "stop"
    assert answer.token_ids[-1] in (IM_END, ENDOFTEXT)


def test_the_demo_answers_a_conversation(demo: tuple[Olmo3, Tokenizer]) -> None:
    messages = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada."},
        {"role": "user", "content": "What is my name?"},
    ]
    assert generate(*demo, messages, temperature=0).text == "Your name is Ada."


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}])
def test_the_pieces_of_a_stream_together_are_what_generate_returns(
    demo: tuple[Olmo3, Tokenizer], options: dict[str, Any]
) -> None:
    messages = [{"role": "system", "content": "Hi."}, {"role": "user", "content": "What is 3 + 4?"}]
    whole = generate(*demo, messages, max_tokens=12, **options)
    pieces = list(stream(*demo, messages, max_tokens=12, **options))
    assert text_of(pieces) == whole.text
    assert tuple(i for piece in pieces for i in piece.token_ids) == whole.token_ids
    assert [piece.generation_tokens for piece in pieces] == list(range(1, len(whole.token_ids) + 1))
    assert pieces[-1].finish_reason == whole.finish_reason
    assert {piece.finish_reason for piece in pieces[:-1]} == {None}
    assert {piece.prompt_tokens for piece in pieces} == {whole.prompt_tokens}


def test_a_seed_repeats_an_answer_and_another_seed_gives_another(demo: tuple[Olmo3, Tokenizer]) -> None:
    first, again, other = (
        generate(*demo, "The sea", raw=True, temperature=2, seed=seed, max_tokens=8).token_ids
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_without_a_seed_answers_differ(demo: tuple[Olmo3, Tokenizer]) -> None:
    first, second = (
        generate(*demo, "The", raw=True, temperature=100, max_tokens=6).token_ids for _ in range(2)
    )
    assert first != second  # of 8192 ** 6 that are about equally likely


# How an answer ends


@pytest.mark.parametrize("end", [IM_END, ENDOFTEXT])
def test_each_end_token_ends_the_answer_and_is_no_part_of_its_text(tokenizer: Tokenizer, end: int) -> None:
    said = tokenizer.encode("One two.")
    answer = generate(ScriptedModel(saying(tokenizer, [*said, end])), tokenizer, "Hi")  # type: ignore[arg-type]
    assert answer.text == "One two."
    assert answer.token_ids == (*said, end)
    assert answer.generation_tokens == len(said) + 1
    assert answer.finish_reason == "stop"


def test_an_answer_that_is_only_an_end_token_is_one_empty_piece(tokenizer: Tokenizer) -> None:
    (piece,) = run(ScriptedModel(saying(tokenizer, [IM_END])), tokenizer)
    assert (piece.text, piece.token_ids, piece.finish_reason) == ("", (IM_END,), "stop")


def test_only_the_models_own_end_tokens_end_an_answer(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, "a<|im_end|>b<|endoftext|>"))
    model.generation_config = GenerationConfig((ENDOFTEXT,))
    assert text_of(run(model, tokenizer)) == "a<|im_end|>b"


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_max_tokens_ends_the_answer_with_length(tokenizer: Tokenizer, max_tokens: int) -> None:
    said = tokenizer.encode("one two three four five six seven")
    pieces = run(ScriptedModel(saying(tokenizer, said)), tokenizer, max_tokens=max_tokens)
    assert [piece.token_ids[0] for piece in pieces] == said[:max_tokens]
    assert pieces[-1].finish_reason == "length"


def test_an_end_token_as_the_last_that_is_allowed_is_a_stop(tokenizer: Tokenizer) -> None:
    said = [*tokenizer.encode("one"), IM_END]
    pieces = run(ScriptedModel(saying(tokenizer, said)), tokenizer, max_tokens=len(said))
    assert pieces[-1].finish_reason == "stop"


@pytest.mark.parametrize("max_tokens", [None, 6, 1000])
def test_the_context_ends_the_answer_with_length(tokenizer: Tokenizer, max_tokens: int | None) -> None:
    prompt = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]))
    model = ScriptedModel(saying(tokenizer, "a"), context=len(prompt) + 6)
    pieces = run(model, tokenizer, max_tokens=max_tokens)
    assert len(pieces) == 6
    assert pieces[-1].finish_reason == "length"


def test_an_unfinished_character_at_the_end_becomes_a_replacement_character(tokenizer: Tokenizer) -> None:
    said = tokenizer.encode("a😀")
    pieces = run(ScriptedModel(saying(tokenizer, said)), tokenizer, max_tokens=len(said) - 1)
    assert [piece.text for piece in pieces] == ["a", *[""] * (len(said) - 3), "\ufffd"]
    ended = run(ScriptedModel(saying(tokenizer, [*said[:-1], IM_END])), tokenizer)
    assert text_of(ended) == "a\ufffd"


def test_pieces_hold_whole_characters_leading_spaces_and_tags(tokenizer: Tokenizer) -> None:
    text = " 漢字 😀<function_calls>f(x=1)</function_calls> <think>"
    pieces = run(ScriptedModel(saying(tokenizer, text + "<|im_end|>")), tokenizer)
    assert text_of(pieces) == text
    assert not any("\ufffd" in piece.text for piece in pieces)


def test_closing_a_stream_early_runs_no_further_step(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, "one two three four five six"))
    pieces: Any = stream(model, tokenizer, "Hi")  # type: ignore[arg-type]
    next(pieces)
    next(pieces)
    pieces.close()
    assert model.calls <= 4  # the prompt, two steps, and one that was queued
    assert next(pieces, None) is None


# Stop strings


def test_a_stop_string_is_held_back_across_pieces(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, letters(tokenizer, "ab </end> no more")))
    pieces = run(model, tokenizer, stop="</end>")
    assert [piece.text for piece in pieces] == ["a", "b", " ", "", "", "", "", "", ""]
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].generation_tokens == len("ab </end>")


def test_what_was_held_back_in_vain_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    for end, limit, reason in (([IM_END], None, "stop"), ([], 5, "length")):
        model = ScriptedModel(saying(tokenizer, [*letters(tokenizer, "ab</e"), *end]))
        pieces = run(model, tokenizer, stop=["</end>"], max_tokens=limit)
        assert text_of(pieces) == "ab</e"
        assert pieces[-1].finish_reason == reason


def test_a_stop_string_completed_by_the_last_token_that_is_allowed_is_a_stop(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, letters(tokenizer, "ab##")))
    pieces = run(model, tokenizer, stop=["##"], max_tokens=4)
    assert text_of(pieces) == "ab"
    assert pieces[-1].finish_reason == "stop"


def test_a_stop_string_inside_one_token_cuts_that_tokens_text(tokenizer: Tokenizer) -> None:
    said = tokenizer.encode("one the two")
    the = tokenizer.encode(" the")
    assert len(the) == 1
    assert the[0] in said
    pieces = run(ScriptedModel(saying(tokenizer, said)), tokenizer, stop=["he"])
    assert text_of(pieces) == "one t"
    assert pieces[-1].token_ids == tuple(the)


def test_the_first_of_several_stop_strings_ends_the_answer(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, letters(tokenizer, "one.\ntwo")))
    assert text_of(run(model, tokenizer, stop=["two", "\n"])) == "one."


def test_a_replacement_character_at_the_end_can_complete_a_stop_string(tokenizer: Tokenizer) -> None:
    said = [*letters(tokenizer, "ab"), *tokenizer.encode("😀")[:-1]]
    pieces = run(ScriptedModel(saying(tokenizer, said)), tokenizer, stop=["b\ufffd"], max_tokens=len(said))
    assert text_of(pieces) == "a"
    assert pieces[-1].finish_reason == "stop"


def test_generate_gives_the_text_before_the_stop_string(demo: tuple[Olmo3, Tokenizer]) -> None:
    answer = generate(*demo, "What is 17 + 25?", temperature=0, stop=" = 42")
    assert (answer.text, answer.finish_reason) == ("17 + 25", "stop")


# Statistics


def test_the_prompts_tokens_are_counted(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    model = ScriptedModel(saying(tokenizer, "a<|im_end|>"))
    assert run(model, tokenizer)[-1].prompt_tokens == len(tokenizer.encode(prompt))


def test_speeds_are_tokens_over_seconds(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("olmo3_mlx.conversation.completion.time", clock)

    def work(model: ScriptedModel, length: int) -> None:
        now[0] += 2.0 if length > 1 else 0.25

    model = ScriptedModel(saying(tokenizer, "one two three four<|im_end|>"), on_call=work)
    pieces = run(model, tokenizer)
    prompt_tokens = pieces[0].prompt_tokens
    for piece in pieces:  # the step after the first may have been queued before it was there
        assert prompt_tokens / 2.25 <= piece.prompt_tps <= prompt_tokens / 2.0
    assert pieces[0].generation_tps == 0
    assert [piece.generation_tps for piece in pieces[1:]] == [4.0] * (len(pieces) - 1)


def test_the_peak_of_memory_is_what_mlx_says(demo: tuple[Olmo3, Tokenizer]) -> None:
    answer = generate(*demo, "Hi", max_tokens=1)
    assert answer.peak_memory == pytest.approx(mx.get_peak_memory() / 1e9, rel=0.2)


def test_progress_is_told_what_is_done_and_ends_with_all(tokenizer: Tokenizer) -> None:
    told: list[tuple[int, int]] = []
    model = ScriptedModel(lambda history: IM_END, context=8192)
    text = "x " * 2500
    pieces = run(model, tokenizer, text, max_tokens=2, progress=lambda *done: told.append(done))
    total = pieces[0].prompt_tokens
    assert total > 2500
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert len(told) > 2
    assert told[0] == (0, total)  # before the first pass, which can take long
    assert {of for _, of in told} == {total}
    assert told[-1] == (total, total)


def test_what_progress_raises_comes_through(tokenizer: Tokenizer) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(ScriptedModel(saying(tokenizer, "a")), tokenizer, progress=interrupt)


# Options


DEFAULTS = GenerationConfig(
    eos_token_ids=(5, 7),
    temperature=0.6,
    top_p=0.9,
    top_k=40,
    min_p=0.1,
    repetition_penalty=1.2,
    max_new_tokens=77,
)


def test_what_is_left_out_comes_from_the_generation_config() -> None:
    options = GenerationOptions.over(DEFAULTS)
    assert options.sampling == SamplingOptions(0.6, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.2)
    assert options.max_tokens == 77
    assert options.eos_token_ids == {5, 7}
    assert options.stop == ()


def test_what_is_given_wins_over_the_generation_config_even_if_it_is_zero() -> None:
    options = GenerationOptions.over(
        DEFAULTS,
        temperature=0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        repetition_penalty=1.0,
        max_tokens=5,
        seed=0,
        stop=["a", "b"],
    )
    assert options.sampling == SamplingOptions(0, top_p=1.0, top_k=0, min_p=0.0, seed=0)
    assert options.max_tokens == 5
    assert options.stop == ("a", "b")


@pytest.mark.parametrize("given", [{"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.2}])
def test_a_filter_given_to_a_greedy_checkpoint_asks_for_sampling(given: dict[str, Any]) -> None:
    greedy = GenerationConfig((1,))
    assert GenerationOptions.over(greedy).sampling.temperature == 0
    assert GenerationOptions.over(greedy, **given).sampling.temperature == 1
    assert GenerationOptions.over(greedy, temperature=0, **given).sampling.temperature == 0
    assert GenerationOptions.over(DEFAULTS, **given).sampling.temperature == 0.6


def test_the_generation_config_limits_an_answer_unless_told(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, "one two three four five six seven eight"))
    model.generation_config = replace(model.generation_config, max_new_tokens=3)
    assert len(run(model, tokenizer)) == 3
    assert len(run(model, tokenizer, max_tokens=5)) == 5


def untouchable(tokenizer: Tokenizer) -> ScriptedModel:
    """A model that fails the test if it is run."""

    def fail(model: ScriptedModel, length: int) -> None:
        pytest.fail("the model was run")

    return ScriptedModel(saying(tokenizer, "a"), on_call=fail)


@pytest.mark.parametrize(
    "option",
    [
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"temperature": -0.1},
        {"temperature": 101},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": -1},
        {"repetition_penalty": float("nan")},
        {"seed": -1},
        {"seed": 2**64},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": [1]},
    ],
    ids=str,
)
def test_an_option_outside_its_range_is_an_error_of_the_call_itself(
    tokenizer: Tokenizer, option: dict[str, Any]
) -> None:
    with pytest.raises(OptionError, match=next(iter(option))) as error:
        stream(untouchable(tokenizer), tokenizer, "Hi", **option)  # type: ignore[arg-type]
    one_line(error)


@pytest.mark.parametrize(
    "option",
    [
        {"max_tokens": 1.5},
        {"max_tokens": "3"},
        {"max_tokens": True},
        {"temperature": "hot"},
        {"top_p": "0.9"},
        {"top_k": 1.5},
        {"min_p": []},
        {"seed": 1.5},
        {"seed": "1"},
        {"stop": 5},
        {"stop": b"a"},
    ],
    ids=str,
)
def test_an_option_of_the_wrong_type_is_an_error_of_the_call_itself(
    tokenizer: Tokenizer, option: dict[str, Any]
) -> None:
    with pytest.raises(OptionError, match=next(iter(option))) as error:
        stream(untouchable(tokenizer), tokenizer, "Hi", **option)  # type: ignore[arg-type]
    one_line(error)


def test_an_option_error_is_a_value_error_and_one_of_ours() -> None:
    with pytest.raises(ValueError, match="max_tokens") as error:
        GenerationOptions.over(DEFAULTS, max_tokens=0)
    assert isinstance(error.value, Olmo3Error)


# Prompts


@pytest.mark.parametrize("prompt", ["", "  \n\t", []])
def test_an_empty_prompt_is_an_error_of_the_call_itself(tokenizer: Tokenizer, prompt: Any) -> None:
    with pytest.raises(PromptError, match="empty") as error:
        stream(untouchable(tokenizer), tokenizer, prompt)  # type: ignore[arg-type]
    one_line(error)


def test_an_empty_raw_prompt_is_an_error_but_blanks_are_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="empty"):
        stream(untouchable(tokenizer), tokenizer, "", raw=True)  # type: ignore[arg-type]
    model = ScriptedModel(lambda history: IM_END)
    assert run(model, tokenizer, " \n\n x", raw=True)[-1].finish_reason == "stop"


def test_a_prompt_must_leave_room_for_an_answer_of_one_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three four")
    model = ScriptedModel(lambda history: 50, context=len(ids) + 1)
    assert len(run(model, tokenizer, "one two three four", raw=True)) == 1
    too_small = replace(untouchable(tokenizer), context=len(ids))
    with pytest.raises(PromptError, match=f"{len(ids)} tokens") as error:
        stream(too_small, tokenizer, "one two three four", raw=True)  # type: ignore[arg-type]
    one_line(error)


def test_an_id_outside_the_models_vocabulary_is_named(tiny: Olmo3, tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match=f"{IM_END}.*128") as error:
        stream(tiny, tokenizer, "a<|im_end|>", raw=True)
    one_line(error)


def test_a_prompt_that_is_not_unicode_is_a_prompt_error(tokenizer: Tokenizer) -> None:
    for raw in (False, True):
        with pytest.raises(PromptError, match="Unicode"):
            stream(untouchable(tokenizer), tokenizer, "a\ud800", raw=raw)  # type: ignore[arg-type]


def test_a_message_list_passes_through_the_template(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    ]
    model = ScriptedModel(saying(tokenizer, "", "ok<|im_end|>"))
    assert text_of(run(model, tokenizer, messages)) == "ok"
    assert tokenizer.decode(model.prompts[0]) == tokenizer.apply_chat_template(messages)


def test_a_text_is_a_users_message_and_system_goes_before_it(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, [IM_END]))
    user = {"role": "user", "content": "Hi"}
    system = {"role": "system", "content": "Be brief."}
    run(model, tokenizer, "Hi")
    run(model, tokenizer, [user])
    run(model, tokenizer, "Hi", system="Be brief.")
    run(model, tokenizer, [user], system="Be brief.")
    run(model, tokenizer, [system, user])
    text, listed, *with_system = (tokenizer.decode(ids) for ids in model.prompts)
    assert text == listed == tokenizer.apply_chat_template([user])
    assert set(with_system) == {tokenizer.apply_chat_template([system, user])}


def test_an_empty_system_message_is_not_the_templates_default(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, [IM_END]))
    run(model, tokenizer, "Hi", system="")
    assert tokenizer.decode(model.prompts[0]).startswith("<|im_start|>system\n<|im_end|>")


def test_two_system_messages_are_refused(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(OptionError, match="system") as error:
        stream(untouchable(tokenizer), tokenizer, messages, system="c")  # type: ignore[arg-type]
    one_line(error)


def test_raw_text_is_continued_as_it_stands(tokenizer: Tokenizer) -> None:
    text = "  Once upon <|im_end|>\n"
    model = ScriptedModel(lambda history: IM_END)
    run(model, tokenizer, text, raw=True)
    assert model.prompts == [tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([{"role": "user", "content": "Hi"}], {}),
        ("Hi", {"system": "Be brief."}),
        ("Hi", {"tools": [{"type": "function"}]}),
    ],
)
def test_raw_refuses_what_only_a_template_can_take(
    tokenizer: Tokenizer, prompt: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(OptionError, match="raw") as error:
        stream(untouchable(tokenizer), tokenizer, prompt, raw=True, **options)  # type: ignore[arg-type]
    one_line(error)


def test_tools_reach_the_template(tokenizer: Tokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {"z": "<&>", "a": 1}}}]
    model = ScriptedModel(saying(tokenizer, [IM_END]))
    run(model, tokenizer, "Hi", tools=tools)
    text = tokenizer.decode(model.prompts[0])
    assert text == tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tools=tools)
    assert '{"z": "<&>", "a": 1}' in text


def test_a_tool_call_of_the_demo_survives_decoding(demo: tuple[Olmo3, Tokenizer]) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]
    answer = generate(*demo, "What is the weather in Paris?", tools=tools, temperature=0, max_tokens=40)
    assert answer.text.startswith("<function_calls>get_weather(")
    assert answer.text.endswith("</function_calls>")


def test_without_a_template_only_raw_text_can_be_continued(tokenizer: Tokenizer) -> None:
    bare = Tokenizer(tokenizer.backend)
    with pytest.raises(TemplateError, match="raw") as error:
        stream(untouchable(tokenizer), bare, "Hi")  # type: ignore[arg-type]
    one_line(error)
    assert run(ScriptedModel(lambda history: IM_END), bare, "Hi there", raw=True)[-1].text == ""


@pytest.mark.parametrize("messages", [["Hi"], [3], "none"])
def test_messages_of_the_wrong_shape_are_an_error_of_ours_with_and_without_system(
    tokenizer: Tokenizer, messages: Any
) -> None:
    prompt = [None] if messages == "none" else messages
    for system in (None, "Be brief."):
        with pytest.raises(Olmo3Error) as error:
            stream(untouchable(tokenizer), tokenizer, prompt, system=system)  # type: ignore[arg-type]
        one_line(error)


def test_a_stream_that_is_not_read_does_no_work(tokenizer: Tokenizer) -> None:
    pieces: Iterator[Completion] = stream(untouchable(tokenizer), tokenizer, "Hi")  # type: ignore[arg-type]
    del pieces


def test_the_repetition_penalty_counts_the_prompt(tokenizer: Tokenizer) -> None:
    (favourite,), (other,) = tokenizer.encode(" the"), tokenizer.encode(" sea")

    class Torn(ScriptedModel):
        """Likes `favourite` a little better than `other`."""

        def __call__(self, tokens: mx.array, caches: Any, **options: Any) -> mx.array:
            super().__call__(tokens, caches)
            ids = mx.arange(8192)
            return mx.where(ids == favourite, 10.0, mx.where(ids == other, 9.0, 0.0))[None, None]

    text = " the the"
    for penalty, expected in ((1.0, favourite), (1.5, other)):
        pieces = run(
            Torn(lambda history: 0), tokenizer, text, raw=True, max_tokens=1, repetition_penalty=penalty
        )
        assert pieces[0].token_ids == (expected,)


def test_stop_strings_and_length_of_the_checkpoint_hold_unless_others_are_given() -> None:
    defaults = GenerationConfig.from_dict({"stop_strings": ["</answer>", "\n"], "max_new_tokens": 7})
    assert GenerationOptions.over(defaults).stop == ("</answer>", "\n")
    assert GenerationOptions.over(defaults).max_tokens == 7
    assert GenerationOptions.over(defaults, stop="END", max_tokens=9).stop == ("END",)
    assert GenerationOptions.over(defaults, stop=[]).stop == ()
    with pytest.raises(ConfigError, match="stop_strings must be a text or a list of them"):
        GenerationConfig.from_dict({"stop_strings": [3]})


# Memory


def test_an_answer_ends_before_memory_runs_out_with_what_was_said(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ScriptedModel(lambda history: 50)
    session = Session(model)
    looks: list[int] = []

    def exhausted(self: MemoryWatch, next_bytes: int = 0) -> bool:
        looks.append(next_bytes)
        return len(looks) in (2, 3)  # also after the checkpoints were let go

    monkeypatch.setattr(MemoryWatch, "exhausted", exhausted)
    pieces = list(stream(model, tokenizer, "Hi", session=session))  # type: ignore[arg-type]
    assert pieces[-1].finish_reason == "memory"
    assert pieces[-1].generation_tokens == 32
    assert all(looks)  # room for the caches to grow was asked for
    assert held_ids(session.caches) == [*model.prompts[0], *[50] * 31]
    again = list(stream(model, tokenizer, "Hi", session=session, max_tokens=3))  # type: ignore[arg-type]
    assert again[-1].prompt_tokens == 1


def test_a_prompt_ends_before_memory_runs_out_and_is_not_lost(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ScriptedModel(lambda history: 50)
    session = Session(model)
    monkeypatch.setenv("OLMO3_MEMORY", "1")
    with pytest.raises(MemoryFitError, match=r"memory would run out after 256 of .* tokens: shorten"):
        list(stream(model, tokenizer, "word " * 600, session=session))  # type: ignore[arg-type]
    assert len(session.tokens) == 256
    monkeypatch.delenv("OLMO3_MEMORY")
    pieces = list(stream(model, tokenizer, "word " * 600, session=session, max_tokens=2))  # type: ignore[arg-type]
    assert pieces[-1].prompt_tokens == len(session.tokens) - 1 - 256
