"""Chats in sessions of their own, and clients that send all of a conversation: only what is new runs."""

from pathlib import Path
from typing import Any

import pytest
from test_chat import assistant, chat_with, say, talker, text_of, thinking, tokenizer, user  # noqa: F401  (fixtures)
from test_completion import ENDOFTEXT, IM_END, ScriptedModel, held_ids, letters, saying

from olmo3_mlx import (
    Chat,
    Completion,
    Olmo3,
    PromptError,
    Session,
    Tokenizer,
    generate,
    stream,
)
from olmo3_mlx.checkpoints.fingerprint import fingerprint
from olmo3_mlx.conversation.completion import join
from olmo3_mlx.sessions.files import SessionFiles

# A session of one's own


def test_a_session_decides_on_the_context(tokenizer: Tokenizer) -> None:
    model = ScriptedModel(saying(tokenizer, "a<|im_end|>"))
    chat = chat_with(model, tokenizer, session=Session(model, context=60))
    with pytest.raises(PromptError, match="60"):
        chat.send("x " * 60)


def test_what_a_session_held_before_a_chat_is_used_and_then_left(
    demo: tuple[Olmo3, Tokenizer],
) -> None:
    session = Session(demo[0])
    say(Chat(*demo, session=session, temperature=0), "My name is Ada.")
    second = say(Chat(*demo, session=session, temperature=0), "My name is Ada.")
    assert text_of(second) == "Nice to meet you, Ada."
    assert second[-1].prompt_tokens == 1


def edited_question(who: tuple[Olmo3, Tokenizer], session: Session, tokens: int) -> tuple[Chat, int]:
    """A conversation of at least so many tokens, its last question edited; and what that ran."""
    chat = Chat(*who, session=session, temperature=0, max_tokens=10)
    while chat.tokens < tokens:
        say(chat, "I walked along the shore and looked at the grey sea and the ships. " * 15)
    say(chat, "What is 3 + 4?")
    return chat, list(chat.edit("What is 17 + 25?"))[-1].prompt_tokens


@pytest.mark.parametrize("name", ["talker", pytest.param("demo", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rewind", [0, 512])
def test_editing_the_last_question_of_a_long_conversation_runs_just_the_new_tokens(
    request: pytest.FixtureRequest, name: str, rewind: int
) -> None:
    model, tokenizer = request.getfixturevalue(name)
    chat, ran = edited_question((model, tokenizer), Session(model, rewind=rewind), 1000)
    new = tokenizer.encode(
        "<|im_end|>\n<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ran <= len(new) + 1
    fresh = generate(model, tokenizer, chat.messages[:-1], temperature=0, max_tokens=10)
    assert fresh.text == chat.messages[-1]["content"]


def test_after_a_restart_only_the_new_tokens_run(talker: tuple[Olmo3, Tokenizer], tmp_path: Path) -> None:
    model, tokenizer = talker

    def session() -> Session:
        return Session(model, files=SessionFiles(tmp_path, fingerprint(model), ""))

    chat, _ = edited_question(talker, session(), 300)
    chat.session.save()
    again = Chat(*talker, session=session(), temperature=0, max_tokens=10)
    again.session.resume()
    again.messages = list(chat.messages)
    ran = say(again, "What is my name?")[-1].prompt_tokens
    new = tokenizer.encode(
        "<|im_end|>\n<|im_start|>user\nWhat is my name?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ran <= len(new) + 1
    say(chat, "What is my name?")
    assert again.messages == chat.messages


@pytest.mark.parametrize("rewind", [1, 512])
@pytest.mark.parametrize("position", [0.5, 0.9, 0.99])
def test_a_long_first_message_whose_end_is_edited_costs_its_end(
    tokenizer: Tokenizer, position: float, rewind: int
) -> None:
    """However long the answer was: the message has snapshots of its own, every 512 tokens."""
    model: Any = ScriptedModel(lambda history: IM_END, window=8, context=8192)
    text = ["I walked along the shore."] * 600
    message, edited = " ".join(text), " ".join([*text[: int(600 * position)], "Nobody came."])
    session = Session(model, rewind=rewind)
    join(stream(model, tokenizer, [user(message)], session=session))
    held = list(session.tokens)
    session.prefill([5] * 900)  # as an answer too long to be rewound
    session.snapshot()
    again = join(stream(model, tokenizer, [user(edited)], session=session))
    ids = tokenizer.encode(tokenizer.apply_chat_template([user(edited)]))
    common = next(i for i, (a, b) in enumerate(zip(ids, held, strict=False)) if a != b)
    assert common > 1800 * position
    assert again.prompt_tokens < len(ids) - common + 512
    assert model.prompts[-1] == ids


# A stateless client


def client(
    tokenizer: Tokenizer, session: Session, history: list[dict[str, str]], text: str, **options: Any
) -> Completion:
    """Sends all of the conversation, and keeps of the answer what is behind its thinking."""
    history.append(user(text))
    model: Any = session._model
    whole = join(stream(model, tokenizer, list(history), session=session, **options))
    history.append(assistant(whole.text.split("</think>")[-1]))
    return whole


@pytest.mark.parametrize("rewind", [1, 16, 512])
@pytest.mark.parametrize("long", [False, True])
def test_a_history_without_its_thinking_costs_only_what_changed(
    thinking: Tokenizer, long: bool, rewind: int
) -> None:
    """What changed is the last answer, now without its thinking, and the new message."""
    length = rewind + 280 if long else 20  # longer than the caches can be rewound
    begin, filler = thinking.encode("<|im_start|>")[0], thinking.encode(" so")[0]
    answers = [thinking.encode(f"</think>The answer is {n}.<|im_end|>") for n in range(5)]

    def script(history: list[int]) -> int:
        since = history[::-1].index(begin) - len(thinking.encode("assistant\n<think>"))
        answer = answers[history.count(begin) // 2 - 1]
        return filler if since < length else [*answer, filler][min(since - length, len(answer))]

    model = ScriptedModel(script, window=8)
    session = Session(model, rewind=rewind)
    history: list[dict[str, str]] = []
    for turn in range(5):
        said = client(thinking, session, history, f"Question {turn}: why is the sea grey?")
        assert said.generation_tokens > length
        assert said.text.endswith(f"The answer is {turn}.")
        if turn:
            changed = thinking.encode(
                f"<|im_start|>assistant\nThe answer is {turn - 1}.<|im_end|>\n<|im_start|>user\n"
                f"Question {turn}: why is the sea grey?<|im_end|>\n<|im_start|>assistant\n<think>"
            )
            assert said.prompt_tokens <= len(changed) + 1
        prompt = thinking.apply_chat_template(history[:-1])
        assert thinking.decode(model.prompts[-1]) == prompt
        assert held_ids(session.caches)[: len(model.prompts[-1])] == model.prompts[-1]


def test_the_demo_thinks_the_same_for_a_client_that_sends_no_thinking_back(
    demo: tuple[Olmo3, Tokenizer], thinking: Tokenizer
) -> None:
    session = Session(demo[0], rewind=4)
    history: list[dict[str, str]] = []
    for text in ("What is 3 + 4?", "What is 17 + 25?"):
        said = client(thinking, session, history, text, temperature=0)
        fresh = generate(demo[0], thinking, history[:-1], temperature=0)
        assert said.token_ids == fresh.token_ids
        assert said.prompt_tokens <= fresh.prompt_tokens


@pytest.mark.parametrize("end", [IM_END, ENDOFTEXT])
def test_a_client_that_sends_everything_back_costs_just_the_new_message(
    thinking: Tokenizer, end: int
) -> None:
    answers = [[*letters(thinking, f"<think>So, {n}.</think>It is {n}."), end] for n in range(4)]
    model = ScriptedModel(saying(thinking, *answers), window=8)
    session = Session(model, rewind=1)
    history: list[dict[str, str]] = []
    added = len(
        thinking.encode("<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>")
    )
    for turn in range(4):
        history.append(user("Why?"))
        any_model: Any = model
        said = join(stream(any_model, thinking, list(history), session=session))
        history.append(assistant("<think>" + said.text))
        if turn:
            assert said.prompt_tokens <= added + 1


def test_an_answer_whose_end_the_client_edited_costs_its_end(tokenizer: Tokenizer) -> None:
    """The model's own spelling is kept as far as its words are."""
    said = "another one of the ships walked along the shore"
    model = ScriptedModel(saying(tokenizer, [*letters(tokenizer, said), IM_END], "ok<|im_end|>"))
    any_model: Any = model
    session = Session(any_model)
    join(stream(any_model, tokenizer, [user("Hi")], session=session))
    history = [user("Hi"), assistant(said.replace("shore", "beach")), user("Ho")]
    again = join(stream(any_model, tokenizer, history, session=session))
    end = tokenizer.encode("beach<|im_end|>\n<|im_start|>user\nHo<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(model.prompts[-1]) == tokenizer.apply_chat_template(history)
    assert again.prompt_tokens <= len(end) + 5
