"""Errors and interrupts in the middle of a session's work leave one that goes on."""

import itertools
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import pytest
from test_completion import ScriptedModel, held_ids
from test_session import VOCABULARY, assert_nothing, goes_on, greedy, ids, model  # noqa: F401  (a fixture)

from olmo3_mlx import Olmo3, PromptError, Session


def scripted(on_call: Callable[[ScriptedModel, int], None] = lambda model, length: None) -> ScriptedModel:
    return ScriptedModel(lambda history: (sum(history) * 31 + 7) % 8000, on_call=on_call, window=8)


def consistent(session: Session, before: Sequence[int]) -> None:
    """The session holds a beginning of `before`, and its caches just that."""
    tokens = list(session.tokens)
    assert tokens == list(before[: len(tokens)])
    assert {cache.offset for cache in session.caches} == {len(tokens)}
    assert not tokens or held_ids(session.caches) == tokens


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", range(1, 6))
def test_an_error_in_the_middle_of_a_prompt_leaves_a_beginning_of_it(
    error: type[BaseException], call: int
) -> None:
    def fail(model: ScriptedModel, length: int) -> None:
        if model.calls == call:
            raise error

    session = Session(scripted(fail), rewind=16)
    text = [i % 90 for i in range(1000)]
    for part in (text[:200], text[200:]):
        try:
            session.prefill(part, snapshot=50)
        except error:
            break
    else:
        assert call > 5
    consistent(session, text)
    held = session.match(text)
    session.prefill(text[held:])
    consistent(session, text)
    assert len(session.tokens) == 1000


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_from_progress_keeps_what_was_done(error: type[BaseException]) -> None:
    def fail(done: int, total: int) -> None:
        if done >= 512:
            raise error

    session = Session(scripted(), rewind=16)
    text = [i % 90 for i in range(1000)]
    with pytest.raises(error):
        session.prefill(text, progress=fail)
    assert list(session.tokens) == text[:512]
    consistent(session, text)
    session.prefill(text[512:])
    consistent(session, text)


@pytest.mark.parametrize("bad", [[], [VOCABULARY], [1, -1]])
def test_a_prompt_that_cannot_be_run_leaves_a_consistent_session(model: Olmo3, bad: list[int]) -> None:
    session = Session(model)
    session.prefill(ids(50))
    with pytest.raises(PromptError):
        session.prefill(bad)
    assert list(session.tokens) in (ids(50), [])
    assert goes_on(model, session)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", range(2, 8))
def test_an_error_in_the_middle_of_an_answer_leaves_a_beginning_of_it(
    error: type[BaseException], call: int
) -> None:
    def fail(model: ScriptedModel, length: int) -> None:
        if model.calls == call:
            raise error

    session = Session(scripted(fail), rewind=16)
    said: list[int] = []
    with pytest.raises(error):
        for token in session.decode(session.prefill(list(range(30))), greedy, 20):
            said.append(token)
    consistent(session, [*range(30), *said])
    assert len(session.tokens) == 0 or len(session.tokens) >= 30
    session.prefill([1, 2, 3])
    assert held_ids(session.caches) == list(session.tokens)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", range(1, 6))
def test_an_error_while_choosing_a_token_leaves_a_beginning_of_the_answer(
    error: type[BaseException], call: int
) -> None:
    """The step that follows is already queued then: the caches have run ahead of what was said."""
    calls = itertools.count(1)

    def choose(logits: mx.array) -> mx.array:
        if next(calls) == call:
            raise error
        return greedy(logits)

    session = Session(scripted(), rewind=16)
    said: list[int] = []
    with pytest.raises(error):
        for token in session.decode(session.prefill(list(range(30))), choose, 20):
            said.append(token)
    consistent(session, [*range(30), *said])
    session.prefill([1, 2, 3])
    assert held_ids(session.caches) == list(session.tokens)


def test_an_answer_closed_early_leaves_all_of_it_but_the_last_id(model: Olmo3) -> None:
    for read in (1, 2, 7):
        session = Session(model, rewind=0)
        answer = session.decode(session.prefill(ids(300)), greedy, 50)
        said = list(itertools.islice(answer, read))
        answer.close()
        assert list(session.tokens) == [*ids(300), *said[:-1]]
        assert goes_on(model, session)
        assert session.goto(300 + read - 1) == 0
        assert goes_on(model, session)


class Interrupt:
    """Raises KeyboardInterrupt when the n-th line of the library begins to run, as a signal would."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __enter__(self) -> None:
        sys.settrace(self.trace)

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if "olmo3_mlx" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return self.trace


def interrupted(at: int, work: Callable[[], object]) -> str:
    """Where `work` was interrupted, empty if it came to its end."""
    try:
        with Interrupt(at):
            work()
    except KeyboardInterrupt as error:
        return str(error)
    return ""


def lines_of(work: Callable[[], object]) -> int:
    counter = Interrupt(10**9)
    with counter:
        work()
    return 10**9 - counter.left


WORK: dict[str, Callable[[Session], object]] = {
    "prefill": lambda session: session.prefill(ids(40, 3), snapshot=30),
    "decode": lambda session: list(session.decode(session.prefill([5]), greedy, 4)),
    "goto by rewinding": lambda session: session.goto(len(session.tokens) - 3),
    "goto by a snapshot": lambda session: session.goto(130),
    "match another branch": lambda session: session.match([*ids(150, 7), 1]),
    "snapshot": lambda session: session.snapshot(),
}


@pytest.mark.parametrize("lines", [8, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", WORK)
def test_an_interrupt_at_any_line_leaves_a_session_that_goes_on_exactly(
    model: Olmo3, what: str, lines: int
) -> None:
    work = WORK[what]

    def begin() -> Session:
        session = Session(model, snapshot_bytes=10**6, rewind=4)
        session.prefill(ids(150, 7))
        session.snapshot()
        session.match([1, 2])
        for part in (ids(120), ids(120, 1)):
            session.prefill(part)
            session.snapshot()
        session.prefill(ids(5, 2))
        return session

    session = begin()
    total = lines_of(lambda: work(session))
    rng = random.Random(0)
    wrong = []
    for at in sorted(rng.sample(range(1, total), min(lines, total - 1))):
        session = begin()
        place = interrupted(at, lambda session=session: work(session))  # type: ignore[misc]
        if not place:
            continue
        try:
            right = goes_on(model, session)
            before = list(session.tokens)
            session.goto(len(before) // 2)
            right = right and list(session.tokens) == before[: len(before) // 2] and goes_on(model, session)
            session.match([*ids(150, 7), 1])
            right = right and goes_on(model, session)
            assert session.snapshot_bytes <= 10**6
        except Exception as error:
            wrong.append(f"{place}: {type(error).__name__}: {str(error).splitlines()[:1]}")
        else:
            if not right:
                wrong.append(f"{place}: other logits")
    assert_nothing(wrong)


def test_an_interrupt_just_where_an_answer_ends_leaves_no_more_than_is_known(model: Olmo3) -> None:
    """The caches have run ahead by then, and nothing of ours runs between two lines."""
    places: list[int] = []

    class Where(Interrupt):
        def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
            if event == "line" and frame.f_code.co_name in ("_decode", "_changing", "_settle"):
                places.append(10**9 - self.left + 1)
            return super().trace(frame, event, argument)

    def begun() -> Session:
        session = Session(model, rewind=4)
        session.prefill(ids(20))
        return session

    session = begun()
    with Where(10**9):
        WORK["decode"](session)
    assert len(places) > 10
    for at in places:
        session = begun()
        assert interrupted(at, lambda session=session: WORK["decode"](session))  # type: ignore[misc]
        assert goes_on(model, session)
