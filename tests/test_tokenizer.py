"""The tokenizer: ids and text, whole and streamed; the files it is read from, and damaged ones."""

import codecs
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from olmo3_mlx import NoTemplateError, Olmo3, PromptError, TemplateError, Tokenizer, TokenizerError
from olmo3_mlx.checkpoints.names import DEMO
from olmo3_mlx.text.tokenizer import Detokenizer

# What the released Instruct tokenizer calls four of the base tokenizer's spare tokens.
INSTRUCT_NAMES = {
    "<|extra_id_1|>": "<functions>",
    "<|extra_id_2|>": "</functions>",
    "<|extra_id_3|>": "<function_calls>",
    "<|extra_id_4|>": "</function_calls>",
}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    """The demo's tokenizer of 8192 ids: rare characters take several."""
    return Tokenizer.from_folder(DEMO)


@pytest.fixture(scope="module")
def base(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The real Olmo 3 tokenizer, as Base, Think and RL-Zero models have it."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "tokenizer.json").write_bytes((shared / "tokenizers" / "dolma2.json").read_bytes())
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def instruct(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The real Olmo 3 tokenizer, as Instruct models have it."""
    folder = tmp_path_factory.mktemp("instruct")
    data = json.loads((shared / "tokenizers" / "dolma2.json").read_text(encoding="utf-8"))
    for token in data["added_tokens"]:
        token["content"] = INSTRUCT_NAMES.get(token["content"], token["content"])
    vocab = data["model"]["vocab"]
    data["model"]["vocab"] = {INSTRUCT_NAMES.get(text, text): i for text, i in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return Tokenizer.from_folder(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer.json and nothing else."""
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    return tmp_path


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> Iterator[str]:
    """The streaming detokenizer's output: a piece for each id, and what is left."""
    detokenizer = tokenizer.detokenizer()
    for token in ids:
        yield detokenizer.add(token)
    yield detokenizer.finish()


def bytes_of_ids(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Each id's bytes, by the definition of byte-level BPE's alphabet (GPT-2's bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
    added = {i: token.content for i, token in tokenizer.backend.get_added_tokens_decoder().items()}
    plain = tokenizer.backend.get_vocab(with_added_tokens=False)
    table = {i: bytes(alphabet[c] for c in text) for text, i in plain.items() if i not in added}
    return table | {i: text.encode() for i, text in added.items()}


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


# Ids and text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello, world!",
        "  two leading spaces",
        " \n\t trailing \n",
        "漢字 😀 👩‍👩‍👧 naïve Ωμέγα",
        "a\x00b\ufffdc",
    ],
)
def test_decoding_the_ids_of_a_text_gives_the_text(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == text


def test_encoding_adds_no_special_tokens(small: Tokenizer, demo: tuple[Olmo3, Tokenizer]) -> None:
    assert small.encode("") == []
    assert not set(small.encode("Hello")) & set(demo[0].generation_config.eos_token_ids)


def test_special_tokens_and_tool_tags_in_a_text_are_single_ids_and_survive_decoding(small: Tokenizer) -> None:
    names = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<functions>", "</functions>"]
    names += ["<function_calls>", "</function_calls>"]
    assert [len(small.encode(name)) for name in names] == [1] * len(names)
    text = " a ".join(names)
    assert small.decode(small.encode(text)) == text


def test_ids_that_are_no_whole_characters_decode_to_replacement_characters(small: Tokenizer) -> None:
    ids = small.encode("😀")
    assert len(ids) > 1
    assert small.decode(ids[:-1]) == "\ufffd"


def test_text_with_lone_surrogates_is_a_prompt_error(small: Tokenizer) -> None:
    with pytest.raises(PromptError, match="Unicode") as error:
        small.encode("a\ud800b")
    one_line(error)


def test_the_vocabulary_counts_the_added_tokens(small: Tokenizer, base: Tokenizer) -> None:
    assert small.vocab_size == 8192
    assert base.vocab_size == 100278


# The released models' tokenizers


def test_golden_prompts_get_the_golden_ids(shared: Path, base: Tokenizer, instruct: Tokenizer) -> None:
    """Instruct families need the tokenizer with the four renamed tokens. The think and rlzero families
    need the base file as it is: there `<functions>` in a system message is several tokens.
    """
    golden = json.loads((shared / "golden" / "chat_golden.json").read_text(encoding="utf-8"))
    assert {family.split("_")[0] for family in golden} == {"instruct", "think", "rlzero"}
    checked = 0
    for family, cases in golden.items():
        tokenizer = instruct if family.startswith("instruct") else base
        for name, case in cases.items():
            if "error" in case:
                continue
            checked += 1
            assert tokenizer.encode(case["text"]) == case["ids"], (family, name)
            assert tokenizer.decode(case["ids"]) == case["text"], (family, name)
            assert "".join(pieces_of(tokenizer, case["ids"])) == case["text"], (family, name)
    assert checked >= 30


def test_only_the_instruct_tokenizer_has_tool_tags_as_tokens(base: Tokenizer, instruct: Tokenizer) -> None:
    assert [instruct.encode(tag) for tag in INSTRUCT_NAMES.values()] == [[100266 + n] for n in range(4)]
    assert base.encode("<functions>") == [27, 22124, 29]


def test_think_is_never_one_token(small: Tokenizer, base: Tokenizer, instruct: Tokenizer) -> None:
    for tokenizer in (base, instruct):
        assert tokenizer.encode("<think>") == [14023, 771, 29]
        assert tokenizer.encode("</think>") == [524, 27963, 29]
        assert tokenizer.encode("<think>\n") == [14023, 771, 397]  # its end merges with what follows
    for tag in ("<think>", "</think>"):
        assert len(small.encode(tag)) > 1


# The streaming detokenizer


def random_ids(tokenizer: Tokenizer, vocabulary: list[int], rng: random.Random) -> list[int]:
    """Any ids, or single bytes, or a text of short and long characters, cut anywhere, with tags."""
    kind = rng.randrange(3)
    length = rng.randrange(1, 25)
    if kind == 0:
        return rng.choices(vocabulary, k=length)
    if kind == 1:
        return [rng.randrange(256) for _ in range(length)]
    parts = [
        "a",
        " the",
        "  ",
        "\n",
        "é",
        "漢",
        "字",
        "ก็",
        "😀",
        "👩‍👩‍👧",
        "🇩🇪",
        "\ufffd",
        "<|im_end|>",
        "</function_calls>",
    ]
    ids = tokenizer.encode("".join(rng.choices(parts, k=length)))
    return ids[rng.randrange(2) : len(ids) - rng.randrange(2)]


@pytest.mark.parametrize("name", ["small", "base"])
def test_a_thousand_random_streams_show_just_what_is_certain_and_all_of_it_in_the_end(
    name: str, request: pytest.FixtureRequest
) -> None:
    """The oracle is Python's incremental UTF-8 decoder: it gives out a character, or U+FFFD, only once
    no byte that follows can change it.
    """
    tokenizer: Tokenizer = request.getfixturevalue(name)
    table = bytes_of_ids(tokenizer)
    vocabulary = sorted(table)
    rng = random.Random(7)
    for _ in range(1000):
        ids = random_ids(tokenizer, vocabulary, rng)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        certain = shown = ""
        detokenizer = tokenizer.detokenizer()
        for token in ids:
            certain += decoder.decode(table[token])
            shown += detokenizer.add(token)
            assert certain.startswith(shown), ids
        certain += decoder.decode(b"", final=True)
        shown += detokenizer.finish()
        assert shown == certain == tokenizer.decode(ids), ids


def test_each_character_of_a_text_is_shown_by_the_id_that_completes_it(small: Tokenizer) -> None:
    text = " 漢字 😀👩‍👩‍👧 naïve 🇩🇪<|im_end|>\n 終わり"
    ids = small.encode(text)
    shown = ""
    for n, piece in enumerate(pieces_of(small, ids), 1):
        shown += piece
        assert shown == small.decode(ids[:n]).rstrip("\ufffd")
    assert shown == text


def test_a_piece_never_holds_a_replacement_character_for_a_character_merely_unfinished(
    small: Tokenizer,
) -> None:
    ids = small.encode("ok 😀")
    *pieces, rest = pieces_of(small, ids[:-1])
    assert "".join(pieces) == "ok "
    assert rest == "\ufffd"  # but it is there if the character never ends
    assert "".join(pieces_of(small, ids)) == "ok 😀"


def test_finishing_twice_gives_the_rest_once(small: Tokenizer) -> None:
    detokenizer = small.detokenizer()
    assert detokenizer.add(small.encode("😀")[0]) == ""
    assert [detokenizer.finish(), detokenizer.finish()] == ["\ufffd", ""]


def test_leading_spaces_survive_streaming(small: Tokenizer) -> None:
    assert next(pieces_of(small, small.encode(" the"))).startswith(" ")
    assert "".join(pieces_of(small, small.encode("   three"))) == "   three"


def test_special_tokens_and_tags_survive_streaming(small: Tokenizer) -> None:
    text = "<|im_start|>assistant\n<function_calls>f(x=1)</function_calls><|endoftext|>"
    pieces = list(pieces_of(small, small.encode(text)))
    assert pieces[0] == "<|im_start|>"
    assert {"<function_calls>", "</function_calls>", "<|endoftext|>"} <= set(pieces)
    assert "".join(pieces) == text


def test_two_detokenizers_do_not_disturb_each_other(small: Tokenizer) -> None:
    first, second = small.detokenizer(), small.detokenizer()
    a, b = small.encode("😀"), small.encode("漢")
    assert first.add(a[0]) == second.add(b[0]) == ""
    assert "".join(first.add(i) for i in a[1:]) == "😀"
    assert "".join(second.add(i) for i in b[1:]) == "漢"


# Files


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json") as error:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in one_line(error)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', "\x00\x01", "null"])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json") as error:
        Tokenizer.from_folder(tmp_path)
    one_line(error)


def test_a_tokenizer_cut_short_is_named(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(TokenizerError, match=r"tokenizer\.json") as error:
        Tokenizer.from_folder(folder)
    one_line(error)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b'"text"', b'{"a": "\xff"}'])
def test_a_damaged_tokenizer_config_is_named(folder: Path, data: bytes) -> None:
    (folder / "tokenizer_config.json").write_bytes(data)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json") as error:
        Tokenizer.from_folder(folder)
    one_line(error)


def test_a_template_file_that_is_not_utf8_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{ messages }}")
    assert_fails_when_used(folder, r"chat_template\.jinja")


def assert_fails_when_used(folder: Path, message: str) -> None:
    """Nothing stands in the way of text as it is; a conversation says what is wrong, each time."""
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode("plain text")) == "plain text"
    for _ in range(2):
        with pytest.raises(TemplateError, match=message) as error:
            tokenizer.apply_chat_template(HELLO)
        assert not isinstance(error.value, NoTemplateError)
        one_line(error)


def test_a_template_that_is_a_link_to_nothing_is_named(folder: Path) -> None:
    """As a cache of the hub has it that was cleaned up; it is not a base model for that."""
    (folder / "chat_template.jinja").symlink_to(folder / "gone")
    assert_fails_when_used(folder, r"chat_template\.jinja: .* a link to nothing")


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ messages", "{% for m in messages %}\n{{ m }}\n", "{{ 1 +"]
)
def test_a_template_that_is_not_valid_jinja_is_an_error_when_it_is_used(folder: Path, source: str) -> None:
    (folder / "chat_template.jinja").write_text(source)
    assert_fails_when_used(folder, "not valid")


def test_without_a_template_text_can_be_encoded_but_no_conversation_rendered(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.chat_template is None
    assert tokenizer.decode(tokenizer.encode("plain text")) == "plain text"
    with pytest.raises(TemplateError, match="raw") as error:
        tokenizer.apply_chat_template(HELLO)
    one_line(error)


def write_config(folder: Path, **config: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_the_template_may_stand_in_the_tokenizer_config(folder: Path) -> None:
    write_config(folder, chat_template="old: {{ messages[0].content }}")
    assert Tokenizer.from_folder(folder).apply_chat_template(HELLO) == "old: Hello"


def test_the_template_file_overrides_the_tokenizer_config(folder: Path) -> None:
    write_config(folder, chat_template="old: {{ messages[0].content }}")
    (folder / "chat_template.jinja").write_text("new: {{ messages[0].content }} 漢", encoding="utf-8")
    assert Tokenizer.from_folder(folder).apply_chat_template(HELLO) == "new: Hello 漢"


NAMED = {"tool_use": "tools", "default": "plain", "rag": "sources"}


def named_in_a_list(folder: Path) -> None:
    write_config(folder, chat_template=[{"name": name, "template": text} for name, text in NAMED.items()])


def named_in_an_object(folder: Path) -> None:
    write_config(folder, chat_template=NAMED)


def named_in_files(folder: Path) -> None:
    write_config(folder, chat_template="old")
    (folder / "chat_template.jinja").write_text("plain")
    (folder / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(NAMED[name])


@pytest.mark.parametrize("write", [named_in_a_list, named_in_an_object, named_in_files])
def test_of_several_named_templates_the_one_for_tools_is_taken_with_tools(
    folder: Path, write: Callable[[Path], None]
) -> None:
    write(folder)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.apply_chat_template(HELLO) == "plain"
    assert tokenizer.apply_chat_template(HELLO, tools=[]) == "tools"  # as in transformers
    assert tokenizer.apply_chat_template(HELLO, tools=[], template="rag") == "sources"
    with pytest.raises(TemplateError, match="of the name other: expected one of default, rag, tool_use"):
        tokenizer.apply_chat_template(HELLO, template="other")


def test_several_templates_without_a_default_are_listed(folder: Path) -> None:
    write_config(folder, chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(TemplateError, match="no chat template of the name default: expected one of rag"):
        Tokenizer.from_folder(folder).apply_chat_template(HELLO)


def test_a_template_that_is_null_is_no_template(folder: Path) -> None:
    write_config(folder, chat_template=None)
    assert Tokenizer.from_folder(folder).chat_template is None


@pytest.mark.parametrize(
    "entry",
    [
        3,
        {"default": 3},
        ["{{ messages }}"],
        [3],
        [{"name": ["default"], "template": "x"}],
        [{"name": "default", "template": 3}],
    ],
)
def test_a_template_entry_of_the_wrong_shape_is_an_error(folder: Path, entry: Any) -> None:
    write_config(folder, chat_template=entry)
    assert_fails_when_used(folder, r"tokenizer_config\.json")


def test_special_tokens_are_given_to_the_template_from_strings_and_from_objects(folder: Path) -> None:
    template = "{{ bos_token }} {{ eos_token }} {{ [pad_token, add_bos_token] | select('defined') | list }}"
    write_config(
        folder,
        chat_template=template,
        bos_token="<|endoftext|>",
        eos_token={"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        pad_token=None,
        add_bos_token=False,
    )
    assert Tokenizer.from_folder(folder).apply_chat_template(HELLO) == "<|endoftext|> <|im_end|> []"


def test_a_file_that_would_cut_or_pad_prompts_does_neither(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    plain = Tokenizer.from_folder(folder).encode("One two three four five six.")
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    assert Tokenizer.from_folder(folder).encode("One two three four five six.") == plain


def test_special_tokens_of_their_own_file_reach_the_template(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    write_config(folder, chat_template="{{ eos_token }}")
    assert Tokenizer.from_folder(folder).apply_chat_template(HELLO) == "<|endoftext|>"


# Text spelled as it was


def spelled(tokenizer: Tokenizer, text: str, rng: random.Random) -> list[int]:
    """Ids of a text, cut into pieces at random places, special tokens aside."""
    ids: list[int] = []
    for part in re.split(r"(<\|[a-z_]+\|>)", text):
        if part.startswith("<|"):
            ids += tokenizer.encode(part)
            continue
        while part:
            length = rng.randint(1, 6)
            ids += tokenizer.encode(part[:length])
            part = part[length:]  # noqa: PLW2901
    return ids


def shared_beginning(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


TURN = "<|im_start|>user\nHello there, old captain.<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "another one of the ships, and the sea: 漢字 é 😀 walked"


def test_a_text_that_nothing_is_held_of_is_encoded(small: Tokenizer) -> None:
    for held in ([], small.encode("<|im_start|>system\nSomething else")):
        assert small.encode_like(TURN, held) == small.encode(TURN)


def test_a_text_is_spelled_as_the_model_spelled_it(small: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(20):
        held = [*small.encode(TURN), *spelled(small, ANSWER, rng)]
        more = f"{TURN}{ANSWER}<|im_end|>\n<|im_start|>user\nAnd?"
        found = small.encode_like(more, held)
        assert found[: len(held)] == held
        assert small.decode(found) == more


def test_two_answers_are_each_spelled_as_they_were(small: Tokenizer) -> None:
    rng = random.Random(1)
    held: list[int] = []
    text = ""
    for _ in range(4):
        held += [*small.encode(TURN), *spelled(small, ANSWER, rng), *small.encode("<|im_end|>\n")]
        text += f"{TURN}{ANSWER}<|im_end|>\n"
    found = small.encode_like(text + TURN, held)
    assert found[: len(held)] == held
    assert small.decode(found) == text + TURN


def test_an_answer_cut_short_is_spelled_as_it_was_as_far_as_it_goes(small: Tokenizer) -> None:
    """The held ids end in the middle of what the text says: its rest is encoded."""
    answer = spelled(small, ANSWER, random.Random(2))
    for stop in range(1, len(answer)):
        held = [*small.encode(TURN), *answer[:stop]]
        found = small.encode_like(TURN + ANSWER, held)
        assert small.decode(found) == TURN + ANSWER
        if "\ufffd" not in small.decode(held):
            assert found[: len(held)] == held


def test_an_answer_whose_end_was_edited_keeps_the_spelling_of_its_beginning(small: Tokenizer) -> None:
    said = "another one of the ships walked along the shore"
    answer = [token for character in said for token in small.encode(character)]
    for follow in ("", "<|im_end|>\n<|im_start|>user\nAnd?"):
        held = [*small.encode(TURN), *answer, *small.encode(follow)]
        text = TURN + said.removesuffix("shore") + "beach" + follow
        found = small.encode_like(text, held)
        assert small.decode(found) == text
        assert shared_beginning(found, held) >= len(small.encode(TURN)) + len(answer) - 6


def test_an_answer_that_was_cut_off_by_the_client_keeps_the_spelling_of_its_beginning(
    small: Tokenizer,
) -> None:
    said = "another one of the ships walked along the shore"
    answer = [token for character in said for token in small.encode(character)]
    held = [*small.encode(TURN), *answer]
    text = TURN + said[:30] + "<|im_end|>\n"
    found = small.encode_like(text, held)
    assert small.decode(found) == text
    assert shared_beginning(found, held) >= len(small.encode(TURN)) + 29


def test_an_unfinished_character_is_not_taken_for_another(small: Tokenizer) -> None:
    parts = small.encode("😀")
    assert len(parts) > 1
    for other in ("😀", "😁", "a", "\ufffd", ""):
        held = [*small.encode(TURN), *small.encode("so "), *parts[:-1]]
        text = f"{TURN}so {other}<|im_end|>"
        assert small.decode(small.encode_like(text, held)) == text


@pytest.mark.parametrize("seed", range(8))
def test_however_something_is_held_a_text_keeps_its_meaning(small: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    pieces = [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "\n",
        "user",
        "assistant",
        "é",
        "😀",
        "漢",
        " the",
    ]
    pieces += [" sea", "an", "other", " ", "  ", "</think>", "<think>", "<function_calls>", "1", "23"]
    for _ in range(60):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 25)))
        other = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 10)))
        held = spelled(small, text[: rng.randint(0, len(text))] + other * rng.randint(0, 1), rng)
        held = held[: rng.randint(0, len(held))]
        found = small.encode_like(text, held)
        assert small.decode(found) == text
        if shared_beginning(found, held) == 0:
            assert not held or not text or found == small.encode(text)


class Counting(Tokenizer):
    """Counts characters encoded, ids decoded, and ids looked at."""

    def __init__(self, like: Tokenizer) -> None:
        super().__init__(like.backend)
        self.work = 0
        self._special = self.looked_at(self._special)

    def looked_at(self, special: frozenset[int]) -> frozenset[int]:
        counting = self

        class Special(frozenset[int]):
            def __contains__(self, token: object) -> bool:
                counting.work += 1
                return super().__contains__(token)

        return Special(special)

    def encode(self, text: str) -> list[int]:
        self.work += len(text)
        return super().encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        self.work += len(ids)
        return super().decode(ids)

    def detokenizer(self) -> Detokenizer:
        counting = self

        class Detokenizing(Detokenizer):
            def add(self, token: int) -> str:
                counting.work += 1
                return super().add(token)

        return Detokenizing(self.backend)

    def held(self, ids: list[int]) -> list[int]:
        counting = self

        class Held(list[int]):
            def __getitem__(self, index: Any) -> Any:
                found = super().__getitem__(index)
                counting.work += len(found) if isinstance(index, slice) else 1
                return found

        return Held(ids)


def test_spelling_a_long_conversation_is_work_in_proportion_to_its_length(small: Tokenizer) -> None:
    """All answers of its turns are spelled otherwise than `encode` spells them."""
    turn = [*small.encode(TURN), *spelled(small, ANSWER, random.Random(5)), *small.encode("<|im_end|>\n")]

    def work(turns: int) -> int:
        counting = Counting(small)
        found = counting.encode_like(f"{TURN}{ANSWER}<|im_end|>\n" * turns, counting.held(turn * turns))
        assert found == turn * turns
        return counting.work

    assert 100 < work(1) < 1000
    assert work(200) <= 200 * work(1)
