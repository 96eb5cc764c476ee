"""olmo3 chat: what its commands do, sessions that are kept, and Ctrl-C."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from command_line import (
    ANSWER,
    GREETING,
    SUM,
    Done,
    Run,
    asks_a_parrot,
    assert_statistics,
    finish,
    read_until,
    start,
)

from olmo3_mlx.cli.chat import last_turn
from olmo3_mlx.conversation.saved import open_conversation

pytestmark = pytest.mark.usefixtures("a_users_shell")

CHAT_HELP = """\
/retry          answer the last message anew
/edit TEXT      say this instead of the last message
/undo           take the last message and its answer back
/history        what was said
/reset          forget the conversation
/system [TEXT]  show the system message, or start anew with this one
/stats          how the last answer went, and what the conversation holds
/help           this
/exit           leave (Ctrl-D too); Ctrl-C ends an answer
"""


def chat(olmo3: Run, *lines: str, options: Sequence[object] = ()) -> Done:
    return olmo3("chat", "--temperature", 0, *options, stdin="".join(f"{line}\n" for line in lines))


def test_a_chat_remembers_what_was_said(olmo3: Run) -> None:
    done = chat(olmo3, "My name is Ada.", "What is my name?")
    greeting = GREETING.replace("parrot", "demo")
    assert done == (0, "Nice to meet you, Ada.\nYour name is Ada.\n", greeting)


@asks_a_parrot
def test_a_chat_ends_with_its_input_or_with_exit(olmo3: Run) -> None:
    assert chat(olmo3) == (0, "", GREETING)
    assert chat(olmo3, "/exit", SUM) == (0, "", GREETING)
    assert olmo3("chat", "--temperature", 0, stdin=SUM) == (0, f"{ANSWER}\n", GREETING)


@asks_a_parrot
def test_empty_lines_are_passed_over(olmo3: Run) -> None:
    assert chat(olmo3, "", "   ", SUM, "") == (0, f"{ANSWER}\n", GREETING)


@asks_a_parrot
def test_help_lists_the_commands(olmo3: Run) -> None:
    assert chat(olmo3, "/help") == (0, CHAT_HELP, GREETING)


@asks_a_parrot
def test_an_unknown_command_is_not_sent(olmo3: Run) -> None:
    done = chat(olmo3, "/sytsem Be terse.", "/dance", "/")
    assert done == (
        1,
        "",
        f"{GREETING}unknown command /sytsem: /help lists them; did you mean /system?\n"
        "unknown command /dance: /help lists them\nunknown command /: /help lists them\n",
    )


@asks_a_parrot
def test_a_message_may_begin_with_a_path(olmo3: Run) -> None:
    assert chat(olmo3, "/etc/hosts holds what?") == (0, f"{ANSWER}\n", GREETING)


@asks_a_parrot
@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["word " * 5000], 1),
        (["word " * 5000, "/stats", "/help", "", "/exit"], 1),  # these cannot fail
        (["/system Be terse.", "/retry", "/edit Hi", "/undo", "/dance"], 1),
        (["word " * 5000, SUM], 0),
        ([SUM, "word " * 5000], 0),
        (["/retry", SUM, "/undo"], 0),
        (["/stats"], 0),
        ([], 0),
    ],
)
def test_a_batch_of_lines_fails_if_none_of_them_could_be_done(
    olmo3: Run, lines: list[str], code: int
) -> None:
    assert chat(olmo3, *lines).code == code


@asks_a_parrot
def test_history_says_so_where_there_is_none(olmo3: Run) -> None:
    assert chat(olmo3, "/history") == (0, "", GREETING + "(nothing was said yet)\n")


@asks_a_parrot
def test_stats_tell_of_the_last_answer_and_of_the_conversation(olmo3: Run) -> None:
    done = chat(olmo3, "/stats", SUM, "/stats", "/reset", "/stats")
    before, answer, last, after, reset = done.out.splitlines()
    assert before == "conversation: 0 messages, 0 of 4096 tokens, caches: 0.000 GB, snapshots: 0.000 GB"
    assert answer == ANSWER
    assert_statistics(last, prompt=57, generated=6, reason="stop")
    assert re.fullmatch(
        r"conversation: 2 messages, 62 of 4096 tokens, caches: 0\.00\d GB, snapshots: 0\.00\d GB", after
    )
    assert reset == before
    assert "finish:" not in chat(olmo3, SUM, "/undo", "/stats").out  # the answer is gone
    assert done.err == GREETING + "(a new conversation)\n"


@asks_a_parrot
def test_only_what_is_new_is_run_on_the_next_turn(olmo3: Run) -> None:
    done = chat(olmo3, SUM, SUM, "/stats")
    found = re.search(r"prompt: (\d+) tokens", done.out)
    assert found
    assert int(found[1]) < 25  # the first turn took 57


@asks_a_parrot
def test_reset_forgets_the_conversation(olmo3: Run) -> None:
    done = chat(olmo3, "My name is Ada.", "/reset", SUM, "/stats")
    assert done.out.startswith(f"{ANSWER}\n{ANSWER}\nprompt: 57 tokens")
    assert "conversation: 2 messages, 62 of 4096" in done.out


@asks_a_parrot
def test_the_system_message_can_be_shown_and_replaced(olmo3: Run) -> None:
    done = chat(olmo3, "/system", "/system Be terse.", "/system", "/stats", "/reset", "/system")
    assert done.out == (
        "(the template's own)\nBe terse.\n"
        "conversation: 1 messages, 0 of 4096 tokens, caches: 0.000 GB, snapshots: 0.000 GB\nBe terse.\n"
    )
    assert done.err == GREETING + 2 * "(a new conversation)\n"
    assert chat(olmo3, "/system", options=["--system", "Be kind."]).out == "Be kind.\n"


@asks_a_parrot
def test_a_message_that_is_too_long_does_not_end_the_chat(olmo3: Run) -> None:
    done = chat(olmo3, "word " * 5000, SUM)
    assert (done.code, done.out) == (0, f"{ANSWER}\n")
    assert re.fullmatch(
        re.escape(GREETING) + r"error: the prompt has \d+ tokens, the context is 4096: .*\n", done.err
    )


@asks_a_parrot
def test_the_last_turn_can_be_answered_anew_edited_and_taken_back(olmo3: Run) -> None:
    lines = ("My name is Ada.", SUM, "/retry", "/edit What is my name?", "/stats", "/undo", "/history")
    done = chat(olmo3, *lines, options=["--temperature", "0"])
    stats = re.search(r"prompt: (\d+) tokens", done.out)
    assert stats
    assert int(stats[1]) < 12  # only what differs from the question before
    assert re.sub(r"prompt: .*\nconversation: .*\n", "", done.out) == (
        f"{ANSWER}\n{ANSWER}\n{ANSWER}\n{ANSWER}\nuser: My name is Ada.\nassistant: {ANSWER}\n"
    )
    assert done.err == GREETING + "(taken back)\n"


@asks_a_parrot
def test_there_must_be_a_turn_to_go_back_to(olmo3: Run) -> None:
    done = chat(olmo3, "/retry", "/edit Hi", "/undo", SUM)
    assert done.out == f"{ANSWER}\n"
    assert done.err.count("error: nothing was said yet") == 3


@asks_a_parrot
def test_a_chat_takes_the_sampling_options(olmo3: Run) -> None:
    assert chat(olmo3, SUM, options=["--stop", " you"]).out == "Nice to meet\n"


@pytest.mark.parametrize("bits", ["8", "4"])
def test_a_chat_with_quantized_caches_remembers_too(olmo3: Run, bits: str) -> None:
    options = ["--kv-bits", bits, "--temperature", "0"]
    done = chat(olmo3, "My name is Ada.", "What is my name?", options=options)
    assert done.out == "Nice to meet you, Ada.\nYour name is Ada.\n"


@pytest.fixture
def sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sessions are kept during a test."""
    monkeypatch.setenv("OLMO3_SESSIONS", str(tmp_path / "sessions"))
    return tmp_path / "sessions"


def test_a_session_goes_on_after_a_restart_without_being_read_again(olmo3: Run, sessions: Path) -> None:
    options = ["--session", "ada", "--temperature", "0"]
    first = chat(olmo3, "My name is Ada.", SUM, options=options)
    second = chat(olmo3, "What is my name?", "/stats", options=options)
    assert second.out.startswith("Your name is Ada.\nprompt: 15 tokens")
    greeting = GREETING.replace("parrot", "demo")
    assert second.err == greeting + (
        f"(going on after 4 messages, 89 tokens of which are held)\n> {SUM}\n17 + 25 = 42\n"
    )
    assert first.err == greeting
    assert len(json.loads((sessions / "ada" / "conversation.json").read_text())["messages"]) == 6


@asks_a_parrot
def test_a_session_keeps_what_its_caches_hold_through_an_empty_conversation(
    olmo3: Run, sessions: Path
) -> None:
    options = ["--session", "ada", "--temperature", "0"]
    emptied = chat(olmo3, "My name is Ada.", "/undo", options=options)
    assert emptied.err == GREETING + "(taken back)\n"
    again = chat(olmo3, "My name is Ada.", "/stats", options=options)
    assert again.err == GREETING
    assert again.out.startswith(f"{ANSWER}\nprompt: 1 token")
    held = chat(olmo3, options=options)
    assert "tokens of which are held" in held.err


@asks_a_parrot
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda caches: (caches / "caches.json").write_text("{"), "caches.json is damaged"),
        (lambda caches: [p.write_bytes(p.read_bytes()[:-1]) for p in caches.glob("*.full.*")], "cut short"),
        (lambda caches: [p.unlink() for p in caches.glob("*.sliding.*")], "missing"),
    ],
)
def test_a_damaged_session_is_read_again_from_its_text(
    olmo3: Run, sessions: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    options = ["--session", "ada", "--temperature", "0"]
    chat(olmo3, "My name is Ada.", options=options)
    spoil(sessions / "ada" / "caches")
    again = chat(olmo3, "What is my name?", "/stats", options=options)
    assert again.code == 0
    assert again.out.startswith(f"{ANSWER}\nprompt: 72 tokens")  # the whole conversation
    assert "(going on after 2 messages, which are read again: " in again.err
    assert reason in again.err
    held = chat(olmo3, options=options)  # and what it said then was kept
    assert "(going on after 4 messages, " in held.err
    assert "tokens of which are held" in held.err


@asks_a_parrot
def test_a_session_without_caches_is_read_again(olmo3: Run, sessions: Path) -> None:
    chat(olmo3, "Hi", options=["--session", "ada"])
    shutil.rmtree(sessions / "ada" / "caches")
    assert (
        "(going on after 2 messages, which are read again)\n" in chat(olmo3, options=["--session", "ada"]).err
    )


@asks_a_parrot
def test_a_session_of_another_form_of_cache_is_read_again(olmo3: Run, sessions: Path) -> None:
    options = ["--session", "ada", "--temperature", "0"]
    chat(olmo3, "My name is Ada.", options=options)
    again = chat(olmo3, "What is my name?", "/stats", options=[*options, "--kv-bits", "8"])
    assert again.out.startswith(f"{ANSWER}\nprompt: 72 tokens")  # the whole conversation
    assert (
        "which are read again: caches.json was kept without --kv-bits, not with --kv-bits 8)\n" in again.err
    )
    back = chat(olmo3, options=[*options, "--kv-bits", "8", "--kv-group-size", "32"])  # the default
    assert "tokens of which are held" in back.err
    late = chat(olmo3, options=[*options, "--kv-bits", "8", "--kv-start", "9"])
    assert "was kept with --kv-bits 8 --kv-start 0, not with --kv-bits 8 --kv-start 9)" in late.err
    assert "was kept with --kv-bits 8, not without --kv-bits)" in chat(olmo3, options=options).err


@asks_a_parrot
def test_a_session_of_another_model_is_read_again_and_says_with_which_it_was_held(
    olmo3: Run, sessions: Path, tiny_original: Path
) -> None:
    options = ["--session", "ada", "--temperature", "0", "--max-tokens", "2"]
    chat(olmo3, "Hi", options=options)
    other = chat(olmo3, "Hi", options=[*options, "--model", str(tiny_original)])
    assert "which are read again: caches.json was kept by another model, parrot)\n" in other.err
    both = chat(olmo3, options=[*options, "--kv-bits", "4"])
    assert (
        "caches.json was kept without --kv-bits, not with --kv-bits 4, and by another model, "
        f"{tiny_original})\n" in both.err
    )
    path = sessions / "ada" / "conversation.json"
    saved = json.loads(path.read_text())
    assert saved.pop("model") == str(tiny_original)  # what was said last was said to it
    path.write_text(json.dumps(saved))
    unknown = chat(olmo3, options=options)
    assert "caches.json was kept by another model)\n" in unknown.err


LONG_ANSWER = "<think>\nHm.\n</think>\n" + "\n".join(f"line {n}" for n in range(30))
LAST_TURNS = {
    "short": ([("user", "Hi"), ("assistant", "Ho\nHa")], ["> Hi", "Ho", "Ha"]),
    "the last of two": ([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")], ["> c", "d"]),
    "a long answer's end": (
        [("user", "Hi"), ("assistant", LONG_ANSWER)],
        ["> Hi", "... line 25", "line 26", "line 27", "line 28", "line 29"],
    ),
    "a long line's end": ([("user", "Hi"), ("assistant", "a" * 999)], ["> Hi", f"... {'a' * 600}"]),
    "a long question's beginning": (
        [("user", "\n".join("abcdefgh")), ("assistant", "x")], ["> a", "b", "c", "d", "e ...", "x"],
    ),
    "no thinking": ([("user", "Hi"), ("assistant", "<think>\nHm.\n</think>\n\nHo")], ["> Hi", "Ho"]),
    "an answer of nothing": ([("user", "Hi"), ("assistant", "")], ["> Hi"]),
    "no question": ([("system", "Be terse.")], []),
}  # fmt: skip


@pytest.mark.parametrize(("messages", "lines"), LAST_TURNS.values(), ids=LAST_TURNS)
def test_the_last_turn_is_shown_in_a_few_lines(messages: list[tuple[str, str]], lines: list[str]) -> None:
    assert last_turn([{"role": role, "content": content} for role, content in messages]) == lines


@asks_a_parrot
def test_a_session_is_open_in_one_process_only(olmo3: Run, sessions: Path) -> None:
    with open_conversation("ada"):
        done = chat(olmo3, SUM, options=["--session", "ada"])
    assert (done.code, done.out) == (1, "")
    assert "another process has the session ada open" in done.err


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "x" * 200])
def test_what_is_no_name_for_a_session_is_refused(olmo3: Run, sessions: Path, name: str) -> None:
    done = chat(olmo3, SUM, options=["--session", name])
    assert (done.code, done.out) == (2, "")
    assert "a session's name must be" in done.err
    assert not sessions.exists()


@asks_a_parrot
def test_a_session_whose_text_is_damaged_is_left_as_it_is(olmo3: Run, sessions: Path) -> None:
    options = ["--session", "ada"]
    chat(olmo3, SUM, options=options)
    path = sessions / "ada" / "conversation.json"
    path.write_text("{not json")
    done = chat(olmo3, SUM, options=options)
    assert (done.code, done.out) == (1, "")
    assert "conversation.json cannot be read" in done.err
    assert path.read_text() == "{not json"


@asks_a_parrot
def test_a_full_disk_does_not_end_the_chat_and_is_told_once(
    olmo3: Run, sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    done = chat(olmo3, SUM, SUM, options=["--session", "ada", "--temperature", "0"])
    assert (done.code, done.out) == (0, f"{ANSWER}\n" * 2)
    assert done.err.count("(not saved is what was said: ") == 1
    assert "No space left on device" in done.err


def test_an_interrupted_chat_goes_on_and_remembers_what_was_said(long_checkpoint: Path) -> None:
    process = start("chat", "--temperature", 0, "--model", long_checkpoint)
    assert process.stdin is not None
    assert process.stdout is not None
    for turn in (1, 2):
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        read_until(process.stdout.fileno(), rb".")
        process.send_signal(signal.SIGINT)
        process.stdin.write(b"/stats\n")
        process.stdin.flush()
        stats = read_until(process.stdout.fileno(), rb"conversation: .*GB\n")
        found = re.search(rb"conversation: (\d+) messages, (\d+) of 100000 tokens", stats)
        assert found
        assert int(found[1]) == 2 * turn
        assert int(found[2]) > 0
    done = finish(process, b"/exit\n")
    assert done.code == 0
    assert "Traceback" not in done.err
    assert done.err.count("(stopped)\n") == 2


@asks_a_parrot
def test_ctrl_c_at_the_prompt_does_not_leave_the_chat() -> None:
    process = start("chat", "--temperature", 0)
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(b"/none\n")
    process.stdin.flush()
    read_until(process.stderr.fileno(), rb"unknown command /none.*\n")  # from here on it waits for input
    process.send_signal(signal.SIGINT)
    assert b"/exit leaves" in read_until(process.stderr.fileno(), rb"leaves\)\n")
    done = finish(process, f"{SUM}\n".encode())
    assert (done.code, done.out) == (0, f"{ANSWER}\n")


@asks_a_parrot
def test_being_told_to_end_loses_neither_a_question_that_is_read_nor_an_answer_that_was_whole(
    olmo3: Run, sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--session", "ada", "--temperature", "0"]

    def told(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise KeyboardInterrupt

    def talk(line: str) -> int:
        with monkeypatch.context() as patch:
            patch.setattr("olmo3_mlx.cli.chat_commands.PrefillProgress.__call__", told)
            return chat(olmo3, line, options=options).code

    assert talk(SUM) == 128 + signal.SIGTERM
    shown = chat(olmo3, "/retry", options=options)
    assert f"> {SUM}\n(it has no answer yet: /retry answers it)" in shown.err
    assert shown.out == f"{ANSWER}\n"
    for line in ("/retry", "/edit Something else."):
        assert talk(line) == 128 + signal.SIGTERM
        assert chat(olmo3, "/history", options=options).out == f"user: {SUM}\nassistant: {ANSWER}\n"
