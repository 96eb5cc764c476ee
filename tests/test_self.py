"""A checkpoint that is calibrated on text that it writes itself."""

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import pytest
from conftest import Told, cut_tokenizer, random_model, save_checkpoint
from test_calibrated import EVEN

from convert import ConvertOptions
from convert import convert as to_mlx
from convert.calibration.text import TextsToRead, written_by
from convert.calibration_texts import texts_to_calibrate_on
from convert.preparing import prepare
from convert.reading.source import Source
from convert.sampling.itself import Itself, _in_words, is_written
from convert.sampling.loop import sampled
from convert.sampling.model import Form, form_that_fits, read_model
from convert.sampling.rows import Conversations, Documents
from convert.sampling.script import Script, script_of
from convert.texts.shipped import calibration_tools
from convert.writer.journal import Journal, SelfWritten
from olmo3_mlx import MemoryFitError, Olmo3, Olmo3Config, OptionError, TokenizerError, load
from olmo3_mlx.checkpoints.names import DEMO
from olmo3_mlx.cli import main
from olmo3_mlx.cli.convert import _options, add_arguments
from olmo3_mlx.published import SIZES
from olmo3_mlx.text.chat_template import ChatTemplate
from olmo3_mlx.text.tokenizer import Tokenizer

FEW: dict[str, Any] = {
    "convert.calibration.text._TOKENS": 512,
    "convert.calibration.text._WRITTEN_TOKENS": 256,
    "convert.calibration.text._LEAST_TOKENS": 256,
    "convert.calibration.text._LENGTH": 64,
    "convert.preparing._LENGTH": 64,
    "convert.calibration.grids._SHRINKS": (1.0, 0.8),
}
TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
ASSISTANT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SHORT = "{% for m in messages %}" + TURN + "{% endfor %}" + ASSISTANT
THINKS = ASSISTANT.replace("assistant\n", "assistant\n<think>")
FORGETS = (  # as Think checkpoints have it: thinking stays in the last answer only
    "{% for m in messages %}"
    "{% set said = m['content'] if loop.last else m['content'].split('</think>')[-1] %}"
    + TURN.replace("m['content']", "said")
    + "{% endfor %}"
    + THINKS
)


@pytest.fixture(autouse=True)
def little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FEW.items():
        monkeypatch.setattr(name, value)


def small_checkpoint(folder: Path, template: str | None = SHORT, **changes: Any) -> Path:
    config = {**EVEN, **changes}
    tensors = {name: a.astype(mx.bfloat16) for name, a in random_model(config).tensors().items()}
    save_checkpoint(folder, config, tensors)
    cut_tokenizer(folder, config["vocab_size"])
    if template is None:
        (folder / "chat_template.jinja").unlink()
    else:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("self") / "source")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(tokenizer.backend, ChatTemplate(template), eos_token="<|endoftext|>")


def played(row: Conversations, said: Iterable[Sequence[int]], end: int) -> list[int]:
    """The ids of a row while one after another says these ids and an end token."""
    ids: list[int] = []
    for turn in said:
        while row._forced:
            ids.append(row.next(-1))
        ids += [row.next(token) for token in turn]
        ids.append(row.next(end))
    return ids


def a_row(script: Script, tokenizer: Tokenizer, seed: int = 0, length: int = 512) -> Conversations:
    return Conversations(script, script.ends, tokenizer.decode, length=length, seed=seed)


# What stands between what is said.


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_row_is_what_the_template_writes(tokenizer: Tokenizer, turns: int) -> None:
    script = script_of(tokenizer)
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": f"It is {i}, not {7 * i}."}
        for i in range(2 * turns)
    ]
    written = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    wanted = [*tokenizer.encode(written), *script.start]
    said = [tokenizer.encode(str(message["content"])) for message in messages]
    rows = [played(a_row(script, tokenizer, seed), said, min(script.ends)) for seed in range(40)]
    assert any(wanted[: len(row)] == row for row in rows), tokenizer.decode(rows[0])


def test_half_of_the_answers_are_followed_by_another_turn(tokenizer: Tokenizer) -> None:
    script = script_of(tokenizer)
    said = [tokenizer.encode("Yes.")] * 400
    ids = played(a_row(script, tokenizer), said, min(script.ends))
    begun = tokenizer.decode(ids).count("<|im_start|>system")
    assert 80 < begun < 120


def test_an_answer_that_calls_is_followed_by_what_the_tool_gives(tokenizer: Tokenizer) -> None:
    tools = calibration_tools()[2]
    script = script_of(tokenizer, tools)
    call = {"function": {"name": "exchange_rate", "arguments": {"day": "today"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "How many euros are 20 pounds?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "23.10"},
        {"role": "assistant", "content": "23.10 euros."},
    ]
    written = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=False)
    texts = [
        str(m["content"]) or '<function_calls>exchange_rate(day="today")</function_calls>' for m in messages
    ]
    said = [tokenizer.encode(text) for text in texts]
    rows = [
        tokenizer.decode(played(a_row(script, tokenizer, seed), said, min(script.ends))) for seed in range(9)
    ]
    assert any(row.startswith(written) for row in rows), rows[0]
    assert "exchange_rate" in tokenizer.decode(script.start)


def test_who_says_much_is_interrupted_where_the_template_closes_a_turn(tokenizer: Tokenizer) -> None:
    script, word = script_of(tokenizer), tokenizer.encode("word")[0]
    row = a_row(script, tokenizer)
    ids = [row.next(word) for _ in range(len(script.start) + 96 + len(script.answer) + 256 + 1)]
    spoken = [*script.start, *[word] * 96, *script.answer, *[word] * 256]
    assert ids[:-1] == spoken
    assert ids[-1] in ((script.again or ())[0], script.end[0])


def test_in_a_short_row_turns_are_short(tokenizer: Tokenizer) -> None:
    script, word = script_of(tokenizer), tokenizer.encode("word")[0]
    row = a_row(script, tokenizer, length=128)
    ids = [row.next(word) for _ in range(len(script.start) + 24 + len(script.answer))]
    assert ids == [*script.start, *[word] * 24, *script.answer]


def test_where_a_template_opens_later_answers_otherwise_conversations_have_one(tokenizer: Tokenizer) -> None:
    later = ASSISTANT.replace("assistant\n", "assistant\n{% if messages | length > 1 %}Well: {% endif %}")
    assert script_of(with_template(tokenizer, SHORT.replace(ASSISTANT, later))).again is None


def test_every_third_row_has_tools_each_time_others(tokenizer: Tokenizer) -> None:
    itself = Itself.of(Source.open(DEMO), tokenizer, DEMO, 512)
    openings = []
    for place in range(9):
        row = itself._row(place)
        openings.append(tokenizer.decode([row.next(5) for _ in range(256)]).partition("<|im_end|>")[0])
    named = [re.findall(r'"name": "(\w+)"', opening)[:1] for opening in openings]
    assert named == [[], [], ["track_parcel"], [], [], ["convert"], [], [], ["exchange_rate"]]


def test_whatever_ends_the_models_texts_ends_a_turn(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "source", eos_token_id=11)
    (folder / "generation_config.json").write_text('{"eos_token_id": [12, 13]}')
    reader = Tokenizer.from_folder(folder)
    itself = Itself.of(Source.open(folder), reader, folder, 64)
    (script,) = itself.scripts
    for end in (11, 12, 13, *reader.eos_token_ids, script.answer[0]):
        row = itself._row(0)
        ids = [row.next(5) for _ in range(len(script.start) + 2)] + [row.next(end) for _ in script.answer]
        assert ids == [*script.start, 5, 5, *script.answer]


def test_a_template_that_thinks_opens_the_thinking(tokenizer: Tokenizer) -> None:
    script = script_of(with_template(tokenizer, SHORT.replace(ASSISTANT, THINKS)))
    assert tokenizer.decode(script.answer).endswith("assistant\n<think>")
    assert tokenizer.decode(script.again or ()) == "<|im_end|>\n<|im_start|>user\n"


def test_where_a_template_forgets_thinking_conversations_have_one_answer(tokenizer: Tokenizer) -> None:
    script = script_of(with_template(tokenizer, FORGETS))
    assert script.again is None
    ids = played(a_row(script, tokenizer), [tokenizer.encode("Yes.")] * 40, min(script.ends))
    assert tokenizer.decode(ids).count("assistant\n<think>") == 20


def test_a_template_without_tools_has_no_turn_of_theirs(tokenizer: Tokenizer) -> None:
    refuses = "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no') }}{% endif %}"
    script = script_of(with_template(tokenizer, SHORT.replace("{% for m in messages %}", refuses)))
    assert script.again
    assert (script.result, script.call) == (None, None)


@pytest.mark.parametrize("change", ["upper", "reverse", "length"])
def test_a_template_that_changes_what_is_said_is_refused(tokenizer: Tokenizer, change: str) -> None:
    changing = SHORT.replace("m['content']", f"m['content'] | {change}")
    with pytest.raises(OptionError, match="does not show what is said"):
        script_of(with_template(tokenizer, changing))


def test_without_a_template_text_goes_on_behind_the_end_token() -> None:
    row = Documents(7)
    assert [row.next(token) for token in (1, 2, 7, 3)] == [7, 2, 7, 3]


# Drawing.


class Dice:
    """A model whose next tokens have the same chances wherever it is; it is told what it said."""

    config = None

    def __init__(self, chances: Sequence[float]) -> None:
        self.logits = mx.log(mx.array(list(chances)))
        self.widths: list[int] = []

    def make_caches(self, options: Any = None) -> list[Any]:
        return []

    def __call__(self, tokens: mx.array, caches: list[Any], **_: Any) -> mx.array:
        self.widths.append(tokens.shape[0])
        return mx.broadcast_to(self.logits, (*tokens.shape, len(self.logits)))


def test_tokens_come_as_often_as_the_model_says() -> None:
    chances = [0.5, 0.25, 0.2, 0.05]
    drawn = sampled(Dice(chances), [Documents(0) for _ in range(16)], 251, 16)
    ids = [token for row in drawn for token in row[1:]]
    for token, chance in enumerate(chances):
        error = (chance * (1 - chance) / len(ids)) ** 0.5
        assert abs(ids.count(token) / len(ids) - chance) < 4 * error


def test_rows_are_the_same_however_many_are_drawn_together() -> None:
    dice = Dice([0.5, 0.25, 0.2, 0.05])
    ways = [sampled(dice, [Documents(0) for _ in range(5)], 12, together) for together in (1, 2, 5)]
    assert ways[0] == ways[1] == ways[2]
    assert set(dice.widths) == {1, 2, 5}
    assert len({tuple(row) for row in ways[0]}) == 5


def test_after_eight_steps_it_is_told_how_long_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100, 10**6, 3))
    monkeypatch.setattr("convert.sampling.loop.time.monotonic", lambda: float(next(now)))
    told: list[float] = []
    passed: list[int] = []
    rows = [Documents(0) for _ in range(5)]
    sampled(Dice([1.0]), rows, 20, 2, passed=passed.append, remaining=told.append)
    assert told == [(60 - 8) * 3 / 6]  # 3 s passed between step 2 and step 8; three batches of 20 steps
    assert sum(passed) == 100


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.1, "1 s"), (41.2, "41 s"), (170, "3 min"), (5000, "83 min"), (9000, "2.5 h")]
)
def test_times_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert _in_words(seconds) == words


# The model in memory.


def a_seven_b() -> Source:
    return cast(Source, SimpleNamespace(config=Olmo3Config.from_dict(SIZES["7b"]), tensors={}))


def test_the_most_exact_form_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.sampling.model._dtype", lambda source: mx.bfloat16)
    found = []
    for memory in ("80G", "17G", "12G", "6G"):
        monkeypatch.setenv("OLMO3_MEMORY", memory)
        found.append(form_that_fits(a_seven_b(), 32, 512))
    assert [form.bits for form in found] == [None, None, 8, 4]
    assert found[0].rows == 32
    assert all(1 <= form.rows < 32 for form in found[1:])
    monkeypatch.setenv("OLMO3_MEMORY", "3G")
    with pytest.raises(MemoryFitError, match="even at 4 bits, this machine has"):
        form_that_fits(a_seven_b(), 32, 512)


def test_the_original_in_memory_is_the_original(source: Path) -> None:
    read = read_model(Source.open(source), Form(mx.float32, None, 1))
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(read(tokens), load(source, dtype="float32")[0](tokens))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_rounded_original_is_what_rounding_makes_of_it(source: Path, tmp_path: Path, bits: int) -> None:
    to_mlx(source, tmp_path / "rounded", bits=bits, dtype="float32")
    read = read_model(Source.open(source), Form(mx.float32, bits, 1))
    tokens = mx.array([[1, 2, 3]])
    assert isinstance(read, Olmo3)
    assert mx.array_equal(read(tokens), load(tmp_path / "rounded")[0](tokens))


# A conversion.


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated in one go."""
    dest = tmp_path_factory.mktemp("whole") / "dest"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FEW.items():
            patch.setattr(name, value)
        to_mlx(source, dest, calibrate="self", bits=4, **TOLD.callbacks)
    return dest


TOLD = Told()  # what `whole` told


def unexpected(*said: Any) -> None:
    pytest.fail(str(said))


def begun(source: Path, dest: Path, told: Told, calibrate: Any = "self", **options: Any) -> Path:
    """Begin a conversion, or go on with it, until it is interrupted; its journal."""
    with pytest.raises(KeyboardInterrupt):
        to_mlx(source, dest, calibrate=calibrate, bits=4, **options, **told.callbacks)
    return dest.parent / f".{dest.name}.unfinished" / "journal.jsonl"


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_a_card_says_that_the_model_wrote_the_text(whole: Path) -> None:
    said = "Calibrated on 256 tokens of what source said itself (sampled from the checkpoint) (SHA-256 `"
    assert said in (whole / "README.md").read_text()


def test_stages_tell_of_it_from_beginning_to_end(whole: Path) -> None:
    assert "sampling from the original, 256 tokens" in TOLD.titles
    assert any(title.startswith("sampling from the original, 256 tokens, about ") for title in TOLD.titles)
    assert TOLD.moves["sampling from the original"][-1] == (256, 256)
    TOLD.assert_each_stage_went_to_its_end()


@pytest.mark.parametrize(("stage", "again"), [("sampling from the original", True), ("calibrating", False)])
def test_a_run_that_goes_on_keeps_what_the_model_wrote(
    source: Path, whole: Path, tmp_path: Path, stage: str, again: bool
) -> None:
    dest, told = tmp_path / "dest", Told()
    begun(source, dest, Told(stage, 3))
    to_mlx(source, dest, calibrate="self", bits=4, resume=True, **told.callbacks)
    assert ("loading the original" in told.titles) is again
    assert weights(dest) == weights(whole)


@pytest.mark.parametrize("damage", [{"ids": [[512] * 64] * 4}, {"ids": 7}, {"bits": "four"}])
def test_what_was_kept_and_is_damaged_is_written_again(
    source: Path, tmp_path: Path, damage: dict[str, Any]
) -> None:
    dest, told = tmp_path / "dest", Told("choosing bits")
    journal = begun(source, dest, Told("choosing bits"))
    first, second = journal.read_text().splitlines()
    journal.write_text(f"{first}\n{json.dumps({'self': {**json.loads(second)['self'], **damage}})}\n")
    begun(source, dest, told, resume=True)
    assert "loading the original" in told.titles


def test_what_was_kept_is_taken_even_where_the_model_would_write_something_else(source: Path) -> None:
    """On a GPU the same rows need not come out the same twice."""
    rounding = prepare(Source.open(source), ConvertOptions(calibrate="self"))
    texts = texts_to_calibrate_on(rounding, ConvertOptions(calibrate="self"), unexpected)
    kept = SelfWritten([[place] * 64 for place in (5, 6, 7, 8)], 4)
    journal = cast(Journal, SimpleNamespace(written=kept))
    read = texts.read(journal, unexpected, unexpected)
    assert sorted(read.tokens[:, 0].tolist()) == [5, 6, 7, 8]  # type: ignore[type-var,arg-type]
    assert read.sha256 == texts.planned.sha256
    assert read.described.figures()["texts"][0] == {
        "kind": "self",
        "name": "what source said itself",
        "about": "sampled from the checkpoint rounded to 4 bits, as the original did not fit",
        "sha256": hashlib.sha256(memoryview(mx.array(kept.ids))).hexdigest(),  # type: ignore[arg-type]
        "sequences": 4,
        "length": 64,
    }
    assert "said itself (sampled from the checkpoint rounded to 4 bits, " in read.described.in_words


@pytest.mark.parametrize("ids", [[[0] * 4] * 2, [[0] * 4] * 4, [[0] * 3] * 3, [[0, 0, 0, -1]] * 3])
def test_rows_of_another_shape_or_vocabulary_are_not_what_was_asked_for(ids: list[list[int]]) -> None:
    assert is_written([[0, 1, 2, 9]] * 3, 3, 4, vocab_size=10)
    assert not is_written(ids, 3, 4, vocab_size=10)


def test_a_model_that_does_not_fit_is_rounded_meanwhile(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.sampling.itself.form_that_fits", lambda *_: Form(mx.float32, 4, 2))
    told = Told("choosing bits")
    journal = begun(source, tmp_path / "dest", told)
    assert "sampling from the original rounded to 4 bits, 256 tokens" in told.titles
    assert Journal(journal.parent, json.loads(journal.read_text().splitlines()[0])).written[1] == 4  # type: ignore[index]


def a_text(folder: Path, name: str, words: int = 600) -> Path:
    path = folder / name
    path.write_text("".join(f"{i} is not {i * i}, " for i in range(words)))
    return path


def test_beside_files_the_model_writes_a_share_like_any_text(source: Path, tmp_path: Path) -> None:
    reader, config = Tokenizer.from_folder(source), Source.open(source).config
    texts = TextsToRead.of([a_text(tmp_path, "notes.txt")], reader, config, written=True)
    assert texts.rows == 4
    ids = [[1] * 64] * 4
    cut = texts.read(written_by("tiny", ids, None))
    assert (cut.kinds.count("self"), cut.kinds.count("notes.txt")) == (4, 4)
    assert cut.sha256 == texts.planned.sha256
    many = [a_text(tmp_path, f"{place}.txt", 100) for place in range(9)]
    assert TextsToRead.of(many, reader, config, written=True).rows == 1
    alone = TextsToRead.of((), reader, config, written=True)
    assert alone.rows == 4  # as many as it may write at all
    assert alone.planned.sha256 != texts.planned.sha256


@pytest.mark.parametrize(("template", "writes"), [(SHORT, True), (None, False)])
def test_a_model_with_a_template_writes_where_nothing_else_is_said(
    tmp_path: Path, template: str | None, writes: bool
) -> None:
    folder = small_checkpoint(tmp_path / "source", template)
    told = Told("choosing bits")
    begun(folder, tmp_path / "dest", told, True)
    assert ("loading the original" in told.titles) is writes


def test_a_model_without_a_template_writes_if_asked(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "source", None)
    origin, reader = Source.open(folder), Tokenizer.from_folder(folder)
    itself = Itself.of(origin, reader, folder, 16)
    rows = itself.written(3, itself.form(3), lambda _: None, lambda *_: None)
    assert {row[0] for row in rows} == {reader.eos_token_ids[0]}
    assert [len(row) for row in rows] == [16, 16, 16]
    assert len({tuple(row) for row in rows}) == 3


# What cannot be.


def test_a_template_that_fills_a_sequence_is_refused_or_done_without(tmp_path: Path) -> None:
    long = SHORT.replace("{% for", "{{ 'word ' * 40 }}{% for", 1)
    folder = small_checkpoint(tmp_path / "source", long, max_position_embeddings=64)
    with pytest.raises(
        OptionError, match=r"takes \d+ tokens before the user's words, of the 64 of a sequence"
    ):
        to_mlx(folder, tmp_path / "dest", calibrate="self", bits=4)
    notices: list[Exception] = []
    told = Told("choosing bits")
    begun(folder, tmp_path / "dest", told, True, notice=notices.append)
    assert "calibrating on texts alone, as the model writes none" in str(notices[0])
    assert "loading the original" not in told.titles


def test_a_short_context_makes_short_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.calibration.text._LENGTH", 512)
    folder = small_checkpoint(tmp_path / "source", max_position_embeddings=48)
    told = Told("choosing bits")
    begun(folder, tmp_path / "dest", told, "self")
    assert "sampling from the original, 240 tokens" in told.titles


def test_without_a_template_and_an_end_token_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "source", None, eos_token_id=None)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(OptionError, match="this one names none"):
        to_mlx(folder, tmp_path / "dest", calibrate="self", bits=4)


def test_without_a_tokenizer_nobody_can_be_asked(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"expected a tokenizer\.json, found none"):
        to_mlx(folder, tmp_path / "dest", calibrate="self", bits=4)


def test_self_is_named_once() -> None:
    with pytest.raises(OptionError, match='"self" twice'):
        ConvertOptions(calibrate=["self", "notes.txt", "self"])


def test_self_needs_the_original_more_than_once() -> None:
    with pytest.raises(OptionError, match="reads the original more than once"):
        ConvertOptions(calibrate="self", keep=False)


@pytest.mark.parametrize(
    ("given", "itself", "chats", "files"),
    [
        ("self", True, False, ()),
        (["self", "a"], True, False, (Path("a"),)),
        ("./self", False, False, (Path("self"),)),
        (Path("self"), False, False, (Path("self"),)),
        (["self", "./self"], True, False, (Path("self"),)),
        ("chats", False, True, ()),
        (["self", "chats", "a"], True, True, (Path("a"),)),
        ("./chats", False, False, (Path("chats"),)),
        (Path("chats"), False, False, (Path("chats"),)),
        (True, False, False, None),
        (False, False, False, None),
    ],
)
def test_a_file_called_self_or_chats_is_named_with_its_folder(
    given: Any, itself: bool, chats: bool, files: tuple[Path, ...] | None
) -> None:
    options = ConvertOptions(calibrate=given)
    assert options.calibrates_on_itself == itself
    assert (options.calibrates_on_chats, options.calibration_files) == (chats, files)


def test_the_command_line_takes_self(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = _options(parser.parse_args(["A", "B", "--calibrate", "self", "notes.txt"]))
    assert options.calibrates_on_itself
    assert options.calibration_files == (Path("notes.txt"),)
    assert main(["convert", "A", "B", "--calibrate", "self", "self"]) != 0
    assert '--calibrate has "self" twice' in capsys.readouterr().err
