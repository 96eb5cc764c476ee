"""Tokens that stand beside tokenizer.json only: added under their own ids, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from olmo3_mlx import Tokenizer, TokenizerError
from olmo3_mlx.checkpoints.names import DEMO

DATA: dict[str, Any] = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
ALL: dict[str, dict[str, Any]] = {entry["content"]: entry for entry in DATA["added_tokens"]}
START, END = ALL["<|im_start|>"]["id"], ALL["<|im_end|>"]["id"]
TURN = "<|im_start|>user\nHello<|im_end|>"


def tokenizer(
    folder: Path, *, without: tuple[str, ...] = (), files: dict[str, Any] | None = None
) -> Tokenizer:
    """The demo's tokenizer, `without` some added tokens in tokenizer.json, with these files beside it."""
    kept = [entry for content, entry in ALL.items() if content not in without]
    (folder / "tokenizer.json").write_text(json.dumps({**DATA, "added_tokens": kept}), encoding="utf-8")
    for name, content in (files or {}).items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return Tokenizer.from_folder(folder)


def decoder(*contents: str, **changes: Any) -> dict[str, Any]:
    """`added_tokens_decoder` as transformers writes it."""
    chosen = {content: ALL[content] for content in contents}
    return {str(e["id"]): {**{k: v for k, v in e.items() if k != "id"}, **changes} for e in chosen.values()}


BOTH = ("<|im_start|>", "<|im_end|>")
CONFIG = "tokenizer_config.json"
WAYS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "in added_tokens_decoder": (BOTH, {CONFIG: {"added_tokens_decoder": decoder(*BOTH)}}),
    "in added_tokens_decoder with all others": (BOTH, {CONFIG: {"added_tokens_decoder": decoder(*ALL)}}),
    "all of them": (tuple(ALL), {CONFIG: {"added_tokens_decoder": decoder(*ALL)}}),
    "in added_tokens.json": (BOTH, {"added_tokens.json": {"<|im_start|>": START, "<|im_end|>": END}}),
    "the only one that lacks": (("<|im_end|>",), {CONFIG: {"eos_token": "<|im_end|>"}}),
    "as an object": (("<|im_end|>",), {CONFIG: {"eos_token": {"content": "<|im_end|>", "special": True}}}),
    "in special_tokens_map.json": (("<|im_end|>",), {"special_tokens_map.json": {"eos_token": "<|im_end|>"}}),
    "in a list": (("<|im_end|>",), {CONFIG: {"additional_special_tokens": ["<|im_end|>"]}}),
    "in a list of version 5": (("<|im_end|>",), {CONFIG: {"extra_special_tokens": ["<|im_end|>"]}}),
    "by names of its own": (("<|im_end|>",), {CONFIG: {"extra_special_tokens": {"end": "<|im_end|>"}}}),
    "named twice": (
        ("<|im_end|>",),
        {CONFIG: {"eos_token": "<|im_end|>", "added_tokens_decoder": decoder("<|im_end|>")}},
    ),
}


@pytest.mark.parametrize(("without", "files"), WAYS.values(), ids=WAYS)
def test_a_token_that_stands_beside_the_tokenizer_is_added_under_its_id(
    tmp_path: Path, without: tuple[str, ...], files: dict[str, Any]
) -> None:
    whole = Tokenizer.from_folder(DEMO)
    found = tokenizer(tmp_path, without=without, files=files)
    assert found.encode(TURN) == whole.encode(TURN)
    assert found.encode(TURN)[0] == START
    assert found.vocab_size == whole.vocab_size
    assert found.decode(whole.encode(TURN)) == TURN


@pytest.mark.parametrize("special", [True, False])
def test_a_new_token_gets_the_next_id_as_in_transformers(tmp_path: Path, special: bool) -> None:
    entry = {"content": "<|new|>", "special": special, "normalized": False}
    found = tokenizer(tmp_path, files={CONFIG: {"added_tokens_decoder": {"8192": entry}}})
    assert found.encode("a<|new|>") == [*found.encode("a"), 8192]
    named = tokenizer(tmp_path, files={CONFIG: {"additional_special_tokens": ["<|one|>", "<|two|>"]}})
    assert named.encode("<|two|><|one|>") == [8193, 8192]


def test_a_token_of_the_vocabulary_that_is_named_special_splits_a_text(tmp_path: Path) -> None:
    """It has an id, but a text is not cut at it until it is an added token."""
    inside = "Ġthe"
    whole = Tokenizer.from_folder(DEMO)
    token_id = whole.backend.token_to_id(inside)
    found = tokenizer(tmp_path, files={CONFIG: {"pad_token": inside}})
    assert token_id not in whole.encode(f"x{inside}x")
    assert token_id in found.encode(f"x{inside}x")
    assert found.vocab_size == whole.vocab_size


AN_OBJECT = r"tokenizer_config\.json: added_tokens_decoder must be an object of ids"
WRONG: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "an id that it cannot have": (
        (), {CONFIG: {"added_tokens_decoder": {"8200": {"content": "<|new|>"}}}},
        r"tokenizer\.json: <\|new\|> cannot have its id 8200, as the next that is free is 8192",
    ),
    "two without an id": (
        BOTH, {CONFIG: {"additional_special_tokens": list(BOTH)}},
        r"nothing says which ids have <\|im_start\|>, ",
    ),
    "texts for objects": ((), {CONFIG: {"added_tokens_decoder": {"8192": "<|new|>"}}}, AN_OBJECT),
    "a list": ((), {CONFIG: {"added_tokens_decoder": ["<|new|>"]}}, AN_OBJECT),
    "no content": ((), {CONFIG: {"added_tokens_decoder": {"8192": {}}}}, AN_OBJECT),
    "no id": ((), {CONFIG: {"added_tokens_decoder": {"x": {"content": "<|new|>"}}}}, AN_OBJECT),
    "an id below 0": ((), {CONFIG: {"added_tokens_decoder": {"-1": {"content": "x"}}}}, AN_OBJECT),
    "ids for tokens": ((), {"added_tokens.json": {"8192": "<|new|>"}}, r"added_tokens\.json: expected"),
}  # fmt: skip


@pytest.mark.parametrize(("without", "files", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_added_is_refused_and_not_added_elsewhere(
    tmp_path: Path, without: tuple[str, ...], files: dict[str, Any], said: str
) -> None:
    with pytest.raises(TokenizerError, match=said) as error:
        tokenizer(tmp_path, without=without, files=files)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip"])
def test_spaces_that_a_token_takes_along_are_as_the_config_says(
    tmp_path: Path, flag: str, shared: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    files = {CONFIG: {"added_tokens_decoder": decoder(*ALL, **{flag: True})}}
    found = tokenizer(tmp_path, files=files)
    text = "a  <|im_end|>  b"
    expected = PreTrainedTokenizerFast.from_pretrained(tmp_path).encode(text, add_special_tokens=False)
    assert found.encode(text) == expected != Tokenizer.from_folder(DEMO).encode(text)


@pytest.mark.parametrize("said", ["<|endoftext|>", None])
def test_the_older_map_of_special_tokens_wins_as_in_transformers(tmp_path: Path, said: str | None) -> None:
    files: dict[str, Any] = {
        CONFIG: {"eos_token": said},
        "special_tokens_map.json": {"eos_token": "<|im_end|>"},
    }
    assert tokenizer(tmp_path, files=files).eos_token_ids == (END,)
    files[CONFIG]["added_tokens_decoder"] = decoder(*ALL)  # the newer form
    newer = ALL["<|endoftext|>"]["id"] if said else END
    assert tokenizer(tmp_path, files=files).eos_token_ids == (newer,)


def test_a_tokenizer_that_has_them_all_is_taken_as_it_is(tmp_path: Path) -> None:
    files = {CONFIG: {"added_tokens_decoder": decoder(*ALL), "eos_token": "<|endoftext|>"}}
    found = tokenizer(tmp_path, files=files)
    assert found.backend.to_str() == Tokenizer.from_folder(DEMO).backend.to_str()
    assert found.eos_token_ids == (ALL["<|endoftext|>"]["id"],)
