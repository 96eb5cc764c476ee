"""Texts by kind: files, conversations through a checkpoint's own template, and sequences cut out of them."""

import contextlib
import hashlib
import json
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convert
from convert.texts.conversations import Conversations, parsed
from convert.texts.files import read_files
from convert.texts.kinds import Label, Tokenized
from convert.texts.sequences import as_many_of_each, cut, shared_out
from convert.texts.shipped import calibration_texts, evaluation_texts
from olmo3_mlx import OptionError, Tokenizer
from olmo3_mlx.checkpoints.names import DEMO
from olmo3_mlx.errors import TemplateError
from olmo3_mlx.text.chat_template import ChatTemplate

SHIPPED = Path(convert.__file__).parent / "text"
KINDS = ["prose", "documents", "code", "mathematics", "questions", "languages", "conversations"]
USER = {"role": "user", "content": "Is it raining in Oslo?"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "rain", "arguments": '{"city": "Oslo"}'}}]}
TOOL = {"role": "tool", "content": "no"}
ANSWER = {"role": "assistant", "content": "It is dry.", "reasoning_content": "The tool says no."}
TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]
# As Think checkpoints have it: no tools, and answers begin inside of thinking.
THINKS = (
    "{% for m in messages if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """The demo's tokenizer, whose template knows tools and does not think."""
    return Tokenizer.from_folder(DEMO)


@pytest.fixture(scope="module")
def thinking(words: Tokenizer) -> Tokenizer:
    return Tokenizer(words.backend, ChatTemplate(THINKS))


@pytest.fixture(scope="module")
def base(words: Tokenizer) -> Tokenizer:
    return Tokenizer(words.backend)


def lines(*entries: Any) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def written(tokenizer: Tokenizer, messages: list[Any], tools: list[Any] | None = None) -> str:
    (conversation,) = parsed(lines({"messages": messages, "tools": tools}), "chats.jsonl")
    return Conversations(tokenizer).written(conversation)


# conversations


def test_a_conversation_goes_through_the_checkpoints_own_template_tools_and_calls_included(
    words: Tokenizer,
) -> None:
    text = written(words, [USER, CALL, TOOL, ANSWER], TOOLS)
    expected = words.apply_chat_template(
        [USER, CALL, TOOL, {"role": "assistant", "content": "It is dry."}],
        tools=TOOLS,
        add_generation_prompt=False,
    )
    assert text == expected
    assert 'rain(city="Oslo")' in text
    assert text.endswith("It is dry.<|endoftext|>")


def test_thinking_stands_before_the_answer_of_a_checkpoint_that_thinks_and_nowhere_else(
    words: Tokenizer, thinking: Tokenizer
) -> None:
    assert written(thinking, [USER, ANSWER]).endswith("<assistant><think>The tool says no.</think>It is dry.")
    assert "The tool says no." not in written(words, [USER, ANSWER])
    plain = {"role": "assistant", "content": "Yes.", "reasoning_content": None}
    assert written(thinking, [USER, plain]).endswith("<assistant>Yes.")


def test_a_list_of_messages_alone_is_a_conversation_and_empty_lines_are_none() -> None:
    found = parsed("\n" + lines([USER]) + "  \n\n" + lines({"messages": [USER], "tools": None}), "a.jsonl")
    assert [(c.messages, c.tools, c.place) for c in found] == [
        ([USER], None, "a.jsonl:2"),
        ([USER], None, "a.jsonl:5"),
    ]
    (odd,) = parsed('[{"role": "user", "content": "a\u2028b"}]', "a.jsonl")  # no end of a line in JSON
    assert odd.messages[0]["content"] == "a\u2028b"


@pytest.mark.parametrize(
    ("messages", "tools", "said"),
    [
        ([USER, ANSWER], TOOLS, "leaves out the tools"),
        ([USER, {**CALL, "content": ""}, ANSWER], None, "leaves out the assistant's tool_calls"),
        ([USER, CALL, TOOL, ANSWER], None, r"leaves out message 3, whose role is tool"),
        ([{"content": "no role"}], None, "expected a message with a role"),
        ([USER, {**ANSWER, "reasoning_content": 5}], None, "expected a text as reasoning_content, got 5"),
        ([{"role": "user", "content": "\ud800"}], None, "expected valid Unicode text"),
    ],
)
def test_what_a_template_refuses_or_would_leave_out_is_said(
    thinking: Tokenizer, messages: list[Any], tools: list[Any] | None, said: str
) -> None:
    with pytest.raises(TemplateError, match=said):
        written(thinking, messages, tools)


# files


def test_a_file_is_a_text_of_its_own_kind_with_the_sum_of_its_bytes(words: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    files = [tmp_path / "a.txt", tmp_path / "b" / "a.txt", tmp_path / "c.jsonl"]
    files[0].write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    files[1].write_text("three")
    files[2].write_text(lines([USER, ANSWER], {"messages": [USER]}))
    texts = read_files(files, words)
    assert [text.label.kind for text in texts] == ["a.txt", "a.txt (2)", "c.jsonl"]
    assert [text.label.name for text in texts] == ["a.txt", "a.txt", "c.jsonl"]
    assert [t.label.sha256 for t in texts] == [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    assert texts[0].documents == ("one\ntwo\n",)
    assert len(texts[2].documents) == 2
    assert texts[1].tokenized(words).documents == (words.encode("three"),)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", r"chats\.jsonl: the text is empty$"),
        (" \n\n", r"chats\.jsonl: the text is empty$"),
        (lines([USER]) + '{"messages": [', r"chats\.jsonl:2: no valid JSON \(.* at column \d+\)$"),
        ("\n5\n", r'chats\.jsonl:2: expected \{"messages": \[\.\.\.\]\} or a list of messages, got 5$'),
        (lines({"prompt": 1}), r"chats\.jsonl:1: .*, got an object of prompt$"),
        (lines({"messages": []}), r"chats\.jsonl:1: expected a list of one message or more, got \[\]$"),
        (
            lines([USER], ["Hello"]),
            r"chats\.jsonl:2: expected messages with a role and content, got 'Hello'$",
        ),
        (lines([{"role": "user"}]), r"chats\.jsonl:1: expected a text as content of the user's message"),
        (lines({"messages": [USER], "tools": "rain"}), r"chats\.jsonl:1: expected a list of tools"),
        ("[" * 100_000, r"chats\.jsonl:1: no valid JSON"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(
    words: Tokenizer, tmp_path: Path, content: str, said: str
) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(content)
    with pytest.raises(OptionError, match=said) as raised:
        read_files([file], words)
    assert "\n" not in str(raised.value)


def test_conversations_for_a_checkpoint_without_a_template_are_refused(
    base: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "chats.JSONL"
    file.write_text(lines([USER]))
    with pytest.raises(
        OptionError, match=r"chats\.JSONL: this checkpoint has no chat template .* plain text"
    ):
        read_files([file], base)


def test_files_that_cannot_be_read_are_refused(
    words: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin1.txt").write_bytes(b"caf\xe9")
    Path("a.txt").write_text("one")
    cases: list[tuple[list[str | Path], str]] = [
        (["none.txt"], r"^none\.txt: the text cannot be read \(No such file or directory\)$"),
        (["latin1.txt"], r"^latin1\.txt: expected a text in UTF-8$"),
        (["."], r"^\. is a folder: expected a text file, or conversations in a \.jsonl file$"),
        (["a.txt", "a.txt"], r"^a\.txt is named twice: name each text once$"),
        (["a.txt", tmp_path / "a.txt"], r"a\.txt is named twice \(as a\.txt, too\): name each text once$"),
    ]
    for files, said in cases:
        with pytest.raises(OptionError, match=said):
            read_files([Path(file) for file in files], words)


# what comes with this package


def test_the_texts_that_come_along_are_of_every_kind_and_no_conversations_without_a_template(
    words: Tokenizer, base: Tokenizer
) -> None:
    calibration, evaluation = calibration_texts(words), evaluation_texts(words)
    assert [text.label.kind for text in calibration] == KINDS
    assert [text.label.kind for text in evaluation] == [KINDS[i] for i in (0, 1, 2, 6)]
    assert len({text.label.sha256 for text in (*calibration, *evaluation)}) == 11
    assert [text.label.kind for text in calibration_texts(base)] == KINDS[:-1]
    assert [text.label.kind for text in evaluation_texts(base)] == KINDS[:3]
    for text in (*calibration, *evaluation):
        assert text.tokenized(words).count > 4096, text.label


def said_in(folder: str) -> str:
    """All that is said in the conversations that come along."""
    found = parsed((SHIPPED / folder / "conversations.jsonl").read_text(), "")
    return "\n".join(message.get("content") or "" for each in found for message in each.messages)


def test_nothing_that_is_measured_on_is_calibrated_on_too(words: Tokenizer) -> None:
    read = "\n".join(chain(*(text.documents for text in calibration_texts(words)[:-1])))
    read += said_in("calibration")
    wholes = ["".join(text.documents) for text in evaluation_texts(words)[:-1]]
    for whole in (*wholes, said_in("evaluation")):
        pieces = [whole[i : i + 60] for i in range(0, len(whole) - 60, 60)]
        assert len(pieces) > 200
        assert not [piece for piece in pieces if piece in read]


def test_conversations_that_a_template_cannot_show_are_left_out_and_counted(
    words: Tokenizer, thinking: Tokenizer
) -> None:
    whole, fewer = (evaluation_texts(tokenizer)[-1] for tokenizer in (words, thinking))
    assert "of" not in whole.label.about.split()
    assert 10 < len(fewer.documents) < len(whole.documents)
    assert fewer.label.about.endswith(f", which shows {len(fewer.documents)} of {len(whole.documents)}")
    assert any("</think>" in document for document in fewer.documents)
    assert not any("</think>" in document for document in whole.documents)


def test_a_template_that_shows_less_than_half_of_the_conversations_gives_no_such_kind(
    words: Tokenizer,
) -> None:
    short = "{% if messages[0].content | length > 60 %}{{ raise_exception('no') }}{% endif %}"
    picky = Tokenizer(words.backend, ChatTemplate(f"{short}{THINKS}"))
    shown = 0
    for line in (SHIPPED / "evaluation" / "conversations.jsonl").read_text().splitlines():
        with contextlib.suppress(TemplateError):
            shown += bool(Conversations(picky).written(parsed(line, "")[0]))
    assert 0 < shown < 12
    assert [text.label.kind for text in evaluation_texts(picky)] == KINDS[:3]


# sequences


def text_of(kind: str, *lengths: int, first: int = 0) -> Tokenized:
    """Documents of these lengths, whose tokens count up from `first`."""
    starts = np.cumsum([first, *lengths])
    documents = tuple(range(a, b) for a, b in pairwise(starts.tolist()))
    return Tokenized(Label(kind, kind, "ab"), tuple(map(list, documents)))


def test_sequences_are_spread_evenly_over_a_text_and_keep_apart() -> None:
    rows = cut(text_of("a", 1000), 100, 4)
    assert [row[0] for row in rows] == [0, 300, 600, 900]
    assert all(row == list(range(row[0], row[0] + 100)) for row in rows)
    assert [row[0] for row in cut(text_of("a", 405), 100, 4)] == [0, 101, 203, 305]
    assert [row[0] for row in cut(text_of("a", 400), 100, 4)] == [0, 100, 200, 300]


def test_a_sequence_begins_where_a_document_does_if_one_is_near() -> None:
    rows = cut(text_of("a", 290, 40, 265, 405), 100, 4)
    assert [row[0] for row in rows] == [0, 290, 595, 900]


def test_as_many_are_cut_of_each_text_one_after_another() -> None:
    found = as_many_of_each([text_of("a", 50), text_of("b", 90, first=1000)], 10, 3)
    assert found.kinds == ("a", "a", "a", "b", "b", "b")
    assert np.array(found.tokens)[:, 0].tolist() == [0, 20, 40, 1000, 1040, 1080]
    assert [(t.label.kind, t.sequences, t.length, t.tokens) for t in found.texts] == [
        ("a", 3, 10, 30),
        ("b", 3, 10, 30),
    ]
    with pytest.raises(
        OptionError, match=r"^b is too short: 60 tokens are needed \(6 .* of 10\), it has 50: "
    ):
        as_many_of_each([text_of("a", 90), text_of("b", 50)], 10, 6)
    with pytest.raises(OptionError, match="1 or more sequences of 2 or more"):
        as_many_of_each([text_of("a", 90)], 1, 6)


@pytest.mark.parametrize(
    ("lengths", "count", "shares"),
    [
        ({"a": 500, "b": 500, "c": 500}, 12, {"a": 4, "b": 4, "c": 4}),
        ({"a": 500, "b": 25, "c": 500}, 12, {"a": 5, "b": 2, "c": 5}),
        ({"a": 20, "b": 30}, 12, {"a": 2, "b": 3}),
    ],
)
def test_texts_share_equally_and_what_one_has_not_got_the_others_give(
    lengths: dict[str, int], count: int, shares: dict[str, int]
) -> None:
    texts = [text_of(kind, length) for kind, length in lengths.items()]
    found = shared_out(texts, 10, count, 1)
    assert Counter(found.kinds) == shares
    assert {text.label.kind: text.sequences for text in found.texts} == shares
    assert found.tokens.shape == (sum(shares.values()), 10)


def test_any_first_sequences_are_a_fair_mix_of_kinds_and_of_places() -> None:
    kinds = ["a", "b", "c", "d"]
    texts = [text_of(kind, 800, first=10_000 * i) for i, kind in enumerate(kinds)]
    found = shared_out(texts, 10, 48, 1)
    for first in range(1, 49):
        mixed = Counter(found.kinds[:first])
        assert all(abs(mixed[kind] - first / 4) <= 1 for kind in kinds), first
    starts = np.array(found.tokens)[:, 0]
    assert [found.kinds[i] for i in range(48)] == [kinds[start // 10_000] for start in starts]
    of_a = [int(start) for start, kind in zip(starts, found.kinds, strict=True) if kind == "a"]
    assert len(set(of_a)) == 12
    assert min(of_a[:4]) < 200
    assert max(of_a[:4]) > 400


def test_texts_that_are_too_short_say_what_they_have() -> None:
    with pytest.raises(
        OptionError, match=r"^a is too short: 80 tokens .* \(8 .* of 10\), it has 75: give a long"
    ):
        shared_out([text_of("a", 75)], 10, 20, 8)
    short = (
        r"^the texts are too short: 80 tokens are needed \(8 .*\), they have 75 \(a 35, b 40\): give more$"
    )
    with pytest.raises(OptionError, match=short):
        shared_out([text_of("a", 35), text_of("b", 40)], 10, 20, 8)
    with pytest.raises(OptionError, match=r"^b is too short: 10 tokens are needed, one sequence, it has 9: "):
        shared_out([text_of("a", 350), text_of("b", 9)], 10, 20, 8)
