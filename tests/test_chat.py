"""Chat: a conversation runs only what is new, and still is what a fresh run would have been."""

import itertools
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import TINY, random_model
from test_completion import ENDOFTEXT, IM_END, ScriptedModel, held_ids, letters, saying

from olmo3_mlx import (
    Chat,
    Completion,
    Olmo3,
    OptionError,
    PromptError,
    Session,
    TemplateError,
    Tokenizer,
    generate,
)
from olmo3_mlx.conversation.completion import _answer, join
from olmo3_mlx.text.chat_template import ChatTemplate


@pytest.fixture(scope="module")
def tokenizer(demo: tuple[Olmo3, Tokenizer]) -> Tokenizer:
    return demo[1]


@pytest.fixture(scope="module")
def thinking(shared: Path, demo: tuple[Olmo3, Tokenizer]) -> Tokenizer:
    """The demo's tokenizer with the template that opens each answer with <think>."""
    source = (shared / "lab" / "templates" / "lab_think.jinja").read_text(encoding="utf-8")
    return Tokenizer(demo[1].backend, ChatTemplate(source))


@pytest.fixture(scope="module")
def talker(tokenizer: Tokenizer) -> tuple[Olmo3, Tokenizer]:
    """A small random model that says plain words: what caches do with a conversation does not depend on what
    is said in it, and the demo takes a second for a hundred tokens.
    """
    config = {
        **TINY,
        "vocab_size": 8192,
        "sliding_window": 128,
        "max_position_embeddings": 4096,
        "eos_token_id": [ENDOFTEXT, IM_END],
    }
    model = random_model(config)
    words = [i for i in range(8192) if re.fullmatch(" [a-z]+", word := tokenizer.decode([i])) and
             tokenizer.encode(word) == [i]]  # fmt: skip
    said = mx.zeros((8192, 1))
    said[mx.array(words)] = 1
    model.lm_head.weight = model.lm_head.weight * said
    return model, tokenizer


def chat_with(model: ScriptedModel, tokenizer: Tokenizer, **options: Any) -> Chat:
    return Chat(model, tokenizer, **options)  # type: ignore[arg-type]


def say(chat: Chat, text: str, **options: Any) -> list[Completion]:
    return list(chat.send(text, **options))


def text_of(pieces: Sequence[Completion]) -> str:
    return "".join(piece.text for piece in pieces)


def ids_of(pieces: Sequence[Completion]) -> tuple[int, ...]:
    return tuple(i for piece in pieces for i in piece.token_ids)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# The demo


def test_the_demo_remembers_a_name_and_runs_only_what_is_new(demo: tuple[Olmo3, Tokenizer]) -> None:
    model, tokenizer = demo
    chat = Chat(model, tokenizer, temperature=0)
    first = say(chat, "My name is Ada.")
    assert text_of(first) == "Nice to meet you, Ada."
    prompt = tokenizer.encode(tokenizer.apply_chat_template([user("My name is Ada.")]))
    assert first[-1].prompt_tokens == len(prompt)
    cached = [*prompt, *ids_of(first)[:-1]]
    assert chat.tokens == len(cached)

    second = say(chat, "What is my name?")
    assert text_of(second) == "Your name is Ada."
    added = tokenizer.encode(
        "<|im_end|>\n<|im_start|>user\nWhat is my name?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert second[-1].prompt_tokens == len(added)
    assert chat.tokens == len(cached) + len(added) + len(ids_of(second)) - 1
    assert chat.messages == [
        user("My name is Ada."),
        assistant("Nice to meet you, Ada."),
        user("What is my name?"),
        assistant("Your name is Ada."),
    ]


def fresh_ids(chat: Chat, ids: Sequence[int]) -> tuple[int, ...]:
    """What the model answers to these ids with empty caches."""
    session = Session(chat.model)
    pieces = _answer(
        session, chat.tokenizer, ids, chat.options, begins=0, memory_is_short=lambda: False, progress=None
    )
    return join(pieces).token_ids


def test_a_conversation_longer_than_the_window_goes_on_as_a_fresh_run_would(
    talker: tuple[Olmo3, Tokenizer],
) -> None:
    model, tokenizer = talker
    chat = Chat(model, tokenizer, temperature=0, max_tokens=20)
    story = "I walked along the shore and looked at the grey sea and the ships, " * 5
    for text in ("My name is Ada.", story):
        say(chat, text)
    assert chat.tokens > model.config.sliding_window == 128
    before, held = list(chat.messages), chat.tokens
    turn = say(chat, "What is my name?")
    fresh = generate(model, tokenizer, [*before, user("What is my name?")], temperature=0, max_tokens=20)
    assert (ids_of(turn), text_of(turn), turn[-1].finish_reason) == (
        fresh.token_ids,
        fresh.text,
        fresh.finish_reason,
    )
    assert turn[-1].prompt_tokens == fresh.prompt_tokens - held


def test_a_thinking_conversation_goes_on_as_a_fresh_run_would(
    demo: tuple[Olmo3, Tokenizer], thinking: Tokenizer
) -> None:
    chat = Chat(demo[0], thinking, temperature=0)
    first = say(chat, "What is 3 + 4?")
    assert "</think>" in text_of(first)
    assert not text_of(first).startswith("<think>")
    assert chat.messages[-1] == assistant("<think>" + text_of(first))  # the opening is the template's
    prompt = thinking.encode(thinking.apply_chat_template([user("What is 3 + 4?")]))
    added = thinking.encode(
        "<|im_end|>\n<|im_start|>user\nAnd 5 + 6?<|im_end|>\n<|im_start|>assistant\n<think>"
    )
    second = say(chat, "And 5 + 6?")
    assert second[-1].prompt_tokens == len(added)
    assert ids_of(second) == fresh_ids(chat, [*prompt, *ids_of(first)[:-1], *added])


@pytest.mark.parametrize("thinks", [False, True])
def test_many_turns_of_a_random_model_are_what_fresh_runs_give(
    tokenizer: Tokenizer, request: pytest.FixtureRequest, thinks: bool
) -> None:
    """Its window of 8 is passed in the first turn, its sliding caches' room of 263 in the third."""
    if thinks:
        tokenizer = request.getfixturevalue("thinking")
    config = {
        **TINY,
        "vocab_size": 8192,
        "max_position_embeddings": 1024,
        "eos_token_id": [ENDOFTEXT, IM_END],
    }
    chat = Chat(random_model(config), tokenizer, temperature=0, max_tokens=15)
    held: list[int] = []
    text = ""
    for n in range(6):
        messages = [*chat.messages, user(f"Turn {n}: " + "the sea and the shore, " * n)]
        prompt = tokenizer.apply_chat_template(messages)
        turn = say(chat, messages[-1]["content"])
        if not prompt.startswith(text):  # the last answer ended inside a character
            held, text = [], ""
        ids = [*held, *tokenizer.encode(prompt.removeprefix(text))]
        assert ids_of(turn) == fresh_ids(chat, ids)
        held = [*ids, *ids_of(turn)[:-1]]
        text = tokenizer.decode(held)
        assert chat.tokens == len(held)
    assert chat.tokens > 300


def test_a_seed_makes_a_conversation_repeatable(talker: tuple[Olmo3, Tokenizer]) -> None:
    def talk(seed: int) -> list[tuple[int, ...]]:
        chat = Chat(*talker, temperature=9, seed=seed, max_tokens=6)
        return [ids_of(say(chat, text)) for text in ("Hi", "Ho")]

    first = talk(1)
    assert talk(1) == first
    assert talk(2) != first


# What the caches hold


@pytest.mark.parametrize("end", [IM_END, ENDOFTEXT])
def test_the_caches_never_hold_the_end_token(tokenizer: Tokenizer, end: int) -> None:
    said = tokenizer.encode("Hello there.")
    model = ScriptedModel(saying(tokenizer, [*said, end], [*said, end]))
    chat = chat_with(model, tokenizer)
    for _ in range(2):
        say(chat, "Hi")
        assert held_ids(chat.session.caches) == [*model.prompts[-1], *said]
        assert chat.tokens == len(model.prompts[-1]) + len(said)
    assert tokenizer.decode(model.prompts[1]) == tokenizer.apply_chat_template(chat.messages[:3])


def test_ids_that_the_model_chose_are_not_tokenized_again(tokenizer: Tokenizer) -> None:
    said = letters(tokenizer, "another")
    assert tokenizer.encode("another") != said
    model = ScriptedModel(saying(tokenizer, [*said, IM_END], "ok<|im_end|>"))
    chat = chat_with(model, tokenizer)
    say(chat, "Hi")
    say(chat, "Ho")
    assert model.prompts[1][: len(model.prompts[0]) + len(said)] == [*model.prompts[0], *said]
    assert tokenizer.decode(model.prompts[1]) == tokenizer.apply_chat_template(chat.messages[:3])


def test_after_max_tokens_the_next_turn_goes_on_from_all_that_was_said(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, "one two three four five six", "ok<|im_end|>"))
    chat = chat_with(model, tokenizer, max_tokens=3)
    assert say(chat, "Hi")[-1].finish_reason == "length"
    second = say(chat, "Ho")
    assert tokenizer.decode(model.prompts[1]) == tokenizer.apply_chat_template(chat.messages[:3])
    assert chat.messages[1] == assistant(
        tokenizer.decode(tokenizer.encode("one two three four five six")[:3])
    )
    assert second[-1].prompt_tokens < len(model.prompts[0])


def test_a_stop_string_and_what_follows_it_is_not_part_of_the_conversation(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, letters(tokenizer, "one## two"), "ok<|im_end|>"))
    chat = chat_with(model, tokenizer, stop="##")
    assert text_of(say(chat, "Hi")) == "one"
    second = say(chat, "Ho")
    assert chat.messages[:2] == [user("Hi"), assistant("one")]
    assert tokenizer.decode(model.prompts[1]) == tokenizer.apply_chat_template(chat.messages[:3])
    assert second[-1].prompt_tokens < len(model.prompts[1]) / 2  # most of it was still in the caches


def test_an_unfinished_character_does_not_spoil_the_next_turn(tokenizer: Tokenizer) -> None:
    said = [*tokenizer.encode("so"), *tokenizer.encode("😀")]
    for limit in range(len(said) - 3, len(said) + 1):
        model = ScriptedModel(saying(tokenizer, said, "ok<|im_end|>"))
        chat = chat_with(model, tokenizer, max_tokens=limit)
        say(chat, "Hi")
        say(chat, "Ho")
        assert tokenizer.decode(model.prompts[1]) == tokenizer.apply_chat_template(chat.messages[:3])


@pytest.mark.parametrize(("window", "rewind"), [(4096, 512), (8, 4)])
def test_an_edited_conversation_is_run_from_where_it_differs_even_where_the_caches_cannot_rewind(
    tokenizer: Tokenizer, window: int, rewind: int
) -> None:
    # Longer than a sliding cache keeps, so that with little rewind only the snapshot is left.
    model = ScriptedModel(
        saying(tokenizer, [*[50] * 400, IM_END], "ok<|im_end|>"), window=window, rewind=rewind
    )
    chat = chat_with(model, tokenizer)
    say(chat, "Hi")
    chat.messages[-1] = assistant("No.")
    (piece, *_) = say(chat, "Ho")
    assert tokenizer.decode(model.prompts[1]) == tokenizer.apply_chat_template(
        [user("Hi"), assistant("No."), user("Ho")]
    )
    assert piece.prompt_tokens <= len(model.prompts[1]) - len(model.prompts[0]) + 3  # "assistant" and newline


def test_a_turn_taken_back_and_sent_again_runs_one_token(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, "one<|im_end|>", "two three<|im_end|>"))
    chat = chat_with(model, tokenizer)
    for text in ("Hi", "Ho"):
        say(chat, text)
    del chat.messages[-2:]
    again = say(chat, "Ho")
    assert text_of(again) == "two three"
    assert again[-1].prompt_tokens == 1
    assert held_ids(chat.session.caches) == [*model.prompts[1], *tokenizer.encode("two three")]


def test_messages_that_were_taken_out_and_put_back_are_run_again(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, "one two three<|im_end|>", "ok<|im_end|>"))
    chat = chat_with(model, tokenizer)
    say(chat, "Hi")
    kept = list(chat.messages)
    chat.messages.clear()
    chat.send("A turn that nobody reads")
    chat.messages[:] = kept
    say(chat, "Ho")
    assert tokenizer.decode(model.prompts[-1]) == tokenizer.apply_chat_template([*kept, user("Ho")])


def test_the_repetition_penalty_counts_earlier_turns(tokenizer: Tokenizer) -> None:
    (favourite,), (other,) = tokenizer.encode(" the"), tokenizer.encode(" sea")

    class Torn(ScriptedModel):
        """Likes `favourite` a little better than `other`, after a first turn that it only ends."""

        def __call__(self, tokens: mx.array, caches: Any, **options: Any) -> mx.array:
            scripted = super().__call__(tokens, caches)
            ids = mx.arange(8192)
            torn = mx.where(ids == favourite, 10.0, mx.where(ids == other, 9.0, 0.0))
            return scripted if len(self.prompts) == 1 else torn[None, None]

    for penalty, expected in ((1.0, favourite), (1.5, other)):
        chat = chat_with(Torn(lambda history: IM_END), tokenizer, max_tokens=1, repetition_penalty=penalty)
        say(chat, "Hi the")
        assert ids_of(say(chat, "Ho")) == (expected,)


def test_the_size_of_the_caches_is_told(demo: tuple[Olmo3, Tokenizer]) -> None:
    chat = Chat(*demo, temperature=0, max_tokens=2)
    assert (chat.tokens, chat.cache_bytes) == (0, 0)
    say(chat, "Hi")
    config = demo[0].config
    heads = config.num_key_value_heads
    least = 2 * config.num_hidden_layers * heads * config.head_dim * chat.tokens * 2  # in 16 bits
    assert chat.cache_bytes >= least


# Turns that do not end as they should


def test_closing_a_stream_early_keeps_what_was_said(tokenizer: Tokenizer) -> None:
    for read in range(1, 6):
        model = ScriptedModel(saying(tokenizer, "one two three four five six", "ok<|im_end|>"))
        chat = chat_with(model, tokenizer)
        pieces: Any = chat.send("Hi")
        said = "".join(next(pieces).text for _ in range(read))
        pieces.close()
        assert said
        assert chat.messages == [user("Hi"), assistant(said)]
        assert held_ids(chat.session.caches) == [*model.prompts[0], *tokenizer.encode(said)[: read - 1]]
        assert text_of(say(chat, "Ho")) == "ok"
        assert tokenizer.decode(model.prompts[1]) == tokenizer.apply_chat_template(chat.messages[:3])


def test_a_reader_that_walks_away_is_as_one_that_closes(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, "one two three four five six", "ok<|im_end|>"))
    chat = chat_with(model, tokenizer)
    abandoned = chat.send("Hi")
    said = next(abandoned).text + next(abandoned).text
    assert text_of(say(chat, "Ho")) == "ok"
    assert chat.messages == [user("Hi"), assistant(said), user("Ho"), assistant("ok")]
    assert tokenizer.decode(model.prompts[1]) == tokenizer.apply_chat_template(chat.messages[:3])
    assert list(abandoned) == []  # it does not go on in the middle of the next turn


def test_breaking_off_the_loop_over_an_answer_ends_it_at_once(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, "one two three four five six"))
    chat = chat_with(model, tokenizer)
    for piece in chat.send("Hi"):
        said = piece.text
        break
    assert chat.messages == [user("Hi"), assistant(said)]
    assert held_ids(chat.session.caches) == model.prompts[0]


def test_a_turn_that_is_never_read_was_never_said(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, "one<|im_end|>", "two<|im_end|>"))
    chat = chat_with(model, tokenizer)
    say(chat, "Hi")
    unread = chat.send("Nobody reads this")
    assert text_of(say(chat, "Ho")) == "two"
    assert chat.messages == [user("Hi"), assistant("one"), user("Ho"), assistant("two")]
    assert tokenizer.decode(model.prompts[1]) == tokenizer.apply_chat_template(chat.messages[:3])
    assert list(unread) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("turn", [0, 1])
def test_an_interrupt_during_the_prompt_leaves_the_conversation_as_it_was(
    tokenizer: Tokenizer, error: type[BaseException], turn: int
) -> None:
    model = ScriptedModel(saying(tokenizer, "one<|im_end|>", "two<|im_end|>"))
    chat = chat_with(model, tokenizer)

    def interrupt(done: int, total: int) -> None:
        if done:
            raise error

    for text in ("Hi", "Ho")[:turn]:
        say(chat, text)
    before = list(chat.messages)
    with pytest.raises(error):
        say(chat, "Stop", progress=interrupt)
    assert chat.messages == before
    assert chat.tokens == len(model.prompts[-1])
    (piece, *rest) = say(chat, "Go on")
    assert text_of([piece, *rest]) == ("one", "two")[turn]
    # What the interrupted turn shares with this one was not read again.
    assert piece.prompt_tokens < len(model.prompts[-1]) / 2
    assert tokenizer.decode(model.prompts[-1]) == tokenizer.apply_chat_template([*before, user("Go on")])


def test_an_interrupt_during_the_answer_keeps_what_was_said(tokenizer: Tokenizer) -> None:
    def interrupt(model: ScriptedModel, length: int) -> None:
        if model.calls == 4:
            raise KeyboardInterrupt

    model = ScriptedModel(saying(tokenizer, "one two three four", "ok<|im_end|>"), on_call=interrupt)
    chat = chat_with(model, tokenizer)
    said = ""
    with pytest.raises(KeyboardInterrupt):
        for piece in chat.send("Hi"):
            said += piece.text
    assert said
    assert chat.messages == [user("Hi"), assistant(said)]
    assert text_of(say(chat, "Ho")) == "ok"
    assert tokenizer.decode(model.prompts[-1]) == tokenizer.apply_chat_template(chat.messages[:3])


@pytest.mark.parametrize("text", ["", "  \n", "a\ud800"])
def test_a_text_that_cannot_be_sent_leaves_the_conversation_as_it_was(
    tokenizer: Tokenizer, text: str
) -> None:
    model = ScriptedModel(saying(tokenizer, "one<|im_end|>", "two<|im_end|>"))
    chat = chat_with(model, tokenizer)
    say(chat, "Hi")
    before, tokens = list(chat.messages), chat.tokens
    with pytest.raises(PromptError) as error:
        chat.send(text)
    assert "\n" not in str(error.value)
    assert (chat.messages, chat.tokens) == (before, tokens)
    assert text_of(say(chat, "Ho")) == "two"
    assert tokenizer.decode(model.prompts[-1]) == tokenizer.apply_chat_template(chat.messages[:3])


def test_a_conversation_that_outgrows_the_context_is_left_as_it_was(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, "one<|im_end|>", "two<|im_end|>"), context=200)
    chat = chat_with(model, tokenizer)
    say(chat, "Hi")
    before, tokens = list(chat.messages), chat.tokens
    with pytest.raises(PromptError, match="200") as error:
        chat.send("x " * 200)
    assert "\n" not in str(error.value)
    assert (chat.messages, chat.tokens) == (before, tokens)
    second = say(chat, "Ho")
    assert text_of(second) == "two"
    assert second[-1].prompt_tokens == len(model.prompts[1]) - tokens


def test_the_context_counts_what_the_caches_hold(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, "one<|im_end|>", "a"), context=120)
    chat = chat_with(model, tokenizer)
    say(chat, "Hi")
    second = say(chat, "Ho")
    assert second[-1].finish_reason == "length"
    assert len(model.prompts[1]) + len(second) == 120
    with pytest.raises(PromptError, match="120"):
        chat.send("And?")


# Beginning and beginning again


def test_a_chat_refuses_bad_options_and_templates_at_once(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, "a"))
    with pytest.raises(OptionError, match="temperature"):
        chat_with(model, tokenizer, temperature=-1)
    with pytest.raises(OptionError, match="stop"):
        chat_with(model, tokenizer, stop="")
    with pytest.raises(TemplateError, match="template"):
        chat_with(model, Tokenizer(tokenizer.backend))
    assert model.calls == 0


@pytest.mark.parametrize("system", [None, "Be brief.", ""])
def test_reset_forgets_everything_but_the_system_message(tokenizer: Tokenizer, system: str | None) -> None:
    model = ScriptedModel(saying(tokenizer, "one<|im_end|>", "two<|im_end|>"))
    chat = chat_with(model, tokenizer, system=system)
    say(chat, "Hi")
    chat.reset()
    assert (chat.tokens, chat.cache_bytes) == (0, 0)
    assert chat.messages == ([] if system is None else [{"role": "system", "content": system}])
    assert text_of(say(chat, "Hi")) == "one"
    assert model.prompts[0] == model.prompts[1]
    assert tokenizer.decode(model.prompts[0]) == tokenizer.apply_chat_template(chat.messages[:-1])


def test_reset_can_change_the_system_message_for_good(tokenizer: Tokenizer) -> None:
    chat = chat_with(ScriptedModel(saying(tokenizer, "one<|im_end|>")), tokenizer, system="Be brief.")
    chat.reset("Be long.")
    assert chat.messages == [{"role": "system", "content": "Be long."}]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be long."}]


def test_reset_in_the_middle_of_an_answer_ends_it(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, "one two three four<|im_end|>"))
    chat = chat_with(model, tokenizer)
    pieces = chat.send("Hi")
    next(pieces)
    chat.reset()
    assert (chat.messages, chat.tokens) == ([], 0)
    assert list(pieces) == []
    assert text_of(say(chat, "Ho")) == "one two three four"


# Any conversation


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_the_model_sees_the_conversation_as_it_was_said(
    tokenizer: Tokenizer, seed: int
) -> None:
    """Turns that are read, left, closed, refused or interrupted, in any order. The model sees at each
    turn just the text of the messages and that turn, and the caches hold what the model saw.
    """
    rng = random.Random(seed)
    words = tokenizer.encode("the sea, a ship## and\n the old captain</function_calls> walked é 漢")
    words += [IM_END]
    model = ScriptedModel(lambda history: words[sum(history) * 31 % 1009 % len(words)], context=1500)
    model.rewind = rng.choice([1, 16, None])
    model.window = rng.choice([8, 4096])
    chat = chat_with(model, tokenizer, max_tokens=rng.choice([1, 7, 40]), stop=rng.choice([None, "##", "a"]))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    said: list[Completion] = []
    left: dict[str, str] | None = None  # the user's message of a turn that was not read to its end
    expected: list[dict[str, str]] = []
    for turn in range(14):
        message = user(f"Turn {turn} " + "of many words " * rng.randrange(12))
        what = rng.choice(["read", "read", "leave", "close", "ignore", "interrupt", "refuse"])
        if what == "refuse":
            with pytest.raises(PromptError):
                chat.send("x " * 2000)
        else:
            pieces: Any = chat.send(message["content"], progress=interrupt if what == "interrupt" else None)
        if left is not None:
            expected += [left, assistant(text_of(said))]
            left = None
        assert chat.messages == expected
        if what in ("refuse", "ignore"):
            continue
        if what == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                next(pieces)
            assert chat.messages == expected
            continue
        said = [next(pieces)]
        prompt = tokenizer.apply_chat_template([*expected, message])
        assert tokenizer.decode(model.prompts[-1]) == prompt
        said += pieces if what == "read" else itertools.islice(pieces, rng.randrange(4))
        if what == "close":
            pieces.close()
        if what == "leave" and said[-1].finish_reason is None:
            left = message
            continue
        if what == "leave":
            pieces.close()
        expected += [message, assistant(text_of(said))]
        assert chat.messages == expected
        assert held_ids(chat.session.caches) == [*model.prompts[-1], *ids_of(said)[:-1]]


# Editing, retrying, taking back


def scripted_chat(tokenizer: Tokenizer, *answers: str, **options: Any) -> tuple[ScriptedModel, Chat]:
    model = ScriptedModel(saying(tokenizer, *(f"{answer}<|im_end|>" for answer in answers)))
    return model, chat_with(model, tokenizer, **options)


def test_a_retry_answers_the_last_message_anew_and_runs_one_token(tokenizer: Tokenizer) -> None:
    model, chat = scripted_chat(tokenizer, "one", "two three")
    for text in ("Hi", "Ho"):
        say(chat, text)
    before = list(chat.messages)
    again = list(chat.retry())
    assert text_of(again) == "two three"
    assert again[-1].prompt_tokens == 1
    assert chat.messages == before
    assert held_ids(chat.session.caches) == [*model.prompts[1], *tokenizer.encode("two three")]


def test_an_edit_puts_another_message_in_the_place_of_the_last(tokenizer: Tokenizer) -> None:
    model, chat = scripted_chat(tokenizer, "one", "two")
    for text in ("Hi", "What is the name of the ship?"):
        say(chat, text)
    edited = list(chat.edit("What is the name of the sea?"))
    assert chat.messages == [
        user("Hi"),
        assistant("one"),
        user("What is the name of the sea?"),
        assistant("two"),
    ]
    assert tokenizer.decode(model.prompts[-1]) == tokenizer.apply_chat_template(chat.messages[:3])
    end = tokenizer.encode(" sea?<|im_end|>\n<|im_start|>assistant\n")
    assert edited[-1].prompt_tokens <= len(end) + 1


def test_undo_takes_the_last_turn_back_and_the_one_before_is_then_the_last(tokenizer: Tokenizer) -> None:
    model, chat = scripted_chat(tokenizer, "one", "two", "three")
    for text in ("Hi", "Ho", "Hu"):
        say(chat, text)
    chat.undo()
    assert chat.messages == [user("Hi"), assistant("one"), user("Ho"), assistant("two")]
    chat.undo()
    assert chat.messages == [user("Hi"), assistant("one")]
    assert text_of(say(chat, "He")) == "two"
    assert tokenizer.decode(model.prompts[-1]) == tokenizer.apply_chat_template(chat.messages[:3])
    chat.undo()
    chat.undo()
    assert chat.messages == []


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("what", ["edit", "retry", "undo"])
def test_before_anything_was_said_there_is_nothing_to_go_back_to(
    tokenizer: Tokenizer, what: str, system: str | None
) -> None:
    _, chat = scripted_chat(tokenizer, "one", system=system)
    before = list(chat.messages)
    does = {"edit": lambda: chat.edit("Ho"), "retry": chat.retry, "undo": chat.undo}[what]
    for _ in range(2):
        with pytest.raises(PromptError, match="nothing was said") as error:
            does()
        assert "\n" not in str(error.value)
        assert chat.messages == before
        say(chat, "Hi")
        chat.undo()
    assert text_of(say(chat, "Hi")) == "one"


@pytest.mark.parametrize("text", ["", " \n", "a\ud800", "x " * 5000, None, 3])
def test_an_edit_that_cannot_be_sent_leaves_the_conversation_as_it_was(
    tokenizer: Tokenizer, text: Any
) -> None:
    _, chat = scripted_chat(tokenizer, "one", "two")
    say(chat, "Hi")
    before, tokens = list(chat.messages), chat.tokens
    with pytest.raises(PromptError):
        chat.edit(text)
    assert (chat.messages, chat.tokens) == (before, tokens)
    assert text_of(say(chat, "Ho")) == "two"


@pytest.mark.parametrize("what", ["edit", "retry"])
def test_an_edit_or_retry_that_is_never_read_or_interrupted_leaves_the_turn(
    tokenizer: Tokenizer, what: str
) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    _, chat = scripted_chat(tokenizer, "one", "two", "three")
    for text in ("Hi", "Ho"):
        say(chat, text)
    before = list(chat.messages)

    def begin(**options: Any) -> Any:
        return chat.edit("Ha", **options) if what == "edit" else chat.retry(**options)

    begin()
    assert chat.messages == before
    with pytest.raises(KeyboardInterrupt):
        list(begin(progress=interrupt))
    assert chat.messages == before
    assert text_of(say(chat, "Hu")) == "three"


def test_a_retry_in_the_middle_of_an_answer_ends_it(tokenizer: Tokenizer) -> None:
    model, chat = scripted_chat(tokenizer, "one two three four")
    pieces = chat.send("Hi")
    next(pieces)
    assert text_of(list(chat.retry())) == "one two three four"
    assert list(pieces) == []
    assert chat.messages == [user("Hi"), assistant("one two three four")]
    assert model.prompts[0] == held_ids(chat.session.caches)[: len(model.prompts[0])]


def test_a_retry_after_messages_were_changed_by_hand_answers_what_stands_there(tokenizer: Tokenizer) -> None:
    model, chat = scripted_chat(tokenizer, "one", "two")
    say(chat, "Hi")
    chat.messages[0] = user("Hello")
    list(chat.retry())
    assert chat.messages[0] == user("Hello")
    assert tokenizer.decode(model.prompts[-1]) == tokenizer.apply_chat_template([user("Hello")])


def test_two_branches_of_a_chat_are_gone_between_without_reading_them_again(
    talker: tuple[Olmo3, Tokenizer],
) -> None:
    chat = Chat(*talker, session=Session(talker[0], rewind=0), temperature=0, max_tokens=30)
    say(chat, "My name is Ada. " + "I walked along the shore and looked at the grey sea. " * 20)
    first = say(chat, "What is my name?")
    turn = len(
        talker[1].encode("<|im_end|>\n<|im_start|>user\nWhat is my name?<|im_end|>\n<|im_start|>assistant\n")
    )
    other = list(chat.edit("What is 3 + 4?"))
    back = list(chat.edit("What is my name?"))
    assert other[-1].prompt_tokens <= turn + 1
    assert back[-1].prompt_tokens <= turn + 1
    assert ids_of(back) == ids_of(first)
