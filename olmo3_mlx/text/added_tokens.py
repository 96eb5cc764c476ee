"""Tokens that a checkpoint names beside tokenizer.json, and at which a text is to be split all the same.

They stand in `added_tokens_decoder` of tokenizer_config.json or in added_tokens.json, with their ids, or are
no more than the `eos_token` and the like. transformers adds them all when it reads a tokenizer; without them
a turn's markers are read as plain text.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from olmo3_mlx.errors import TokenizerError

# The names that transformers gives to special tokens, and its lists of others.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")

_FLAGS: Mapping[str, bool] = {
    "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True,
}  # fmt: skip
_SPLITTING = ("single_word", "lstrip", "rstrip", "normalized")  # what changes how a text is split
_NEXT = 2**32 - 1  # stands for the id of a token that gets the next one: the library's largest


def with_named_tokens(
    backend: Backend, path: Path, config: Mapping[str, Any], added: Mapping[str, Any]
) -> Backend:
    """The tokenizer of the file `path`, with the tokens that only tokenizer_config.json (`config`) or
    added_tokens.json (`added`) name, under the ids that they have there; one without an id gets the next. A
    token that both have is as `added_tokens_decoder` says, as in transformers, under tokenizer.json's id.

    Raises TokenizerError if a token cannot have its id, or if nobody says which it has (transformers would
    give it another in silence); and for entries that are none.
    """
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    changed: dict[str, dict[str, Any]] = {}
    for entry in (*_with_ids(path.parent, config, added), *_without_ids(config)):
        token = known.get(entry["content"])
        if token is None:
            changed.setdefault(entry["content"], {**_FLAGS, **entry})
        elif any(entry.get(flag, getattr(token, flag)) != getattr(token, flag) for flag in _SPLITTING):
            flags = {flag: getattr(token, flag) for flag in _FLAGS}
            changed.setdefault(entry["content"], {**flags, **entry})
    return _completed(backend, path, changed) if changed else backend


def _completed(backend: Backend, path: Path, changed: Mapping[str, dict[str, Any]]) -> Backend:
    data = json.loads(path.read_text(encoding="utf-8"))
    for content, entry in changed.items():
        known = backend.token_to_id(content)
        entry["id"] = entry["id"] if known is None else known
    kept = [entry for entry in data.get("added_tokens", ()) if entry["content"] not in changed]
    entries = [*kept, *changed.values()]
    begin = backend.get_vocab_size(with_added_tokens=False)
    taken = {entry["id"] for entry in entries} - {_NEXT}
    free = set(range(begin, max(taken, default=0))) - taken
    nameless = [entry for entry in entries if entry["id"] == _NEXT]
    if nameless and free:
        if len(free) > 1 or len(nameless) > 1:
            contents = ", ".join(entry["content"] for entry in nameless)
            raise TokenizerError(
                f"{path}: nothing says which ids have {contents}: add them to its added_tokens"
            )
        nameless[0]["id"] = min(free)
    # The library numbers tokens in their order, whatever their ids say.
    entries.sort(key=lambda entry: int(entry["id"]))
    completed = Backend.from_str(json.dumps({**data, "added_tokens": entries}))
    for entry in entries:
        given = completed.token_to_id(entry["content"])
        if entry["id"] not in (_NEXT, given):
            raise TokenizerError(
                f"{path}: {entry['content']} cannot have its id {entry['id']}, as the next that is free is "
                f"{given}: add the tokens that lie between to tokenizer.json"
            )
    return completed


def token_text(token: Any) -> str | None:
    """The text of a special token, which files give as such or as an object with its `content`."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) and content else None


def _with_ids(folder: Path, config: Mapping[str, Any], added: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    decoder = config.get("added_tokens_decoder") or {}
    try:
        for token_id, token in decoder.items():
            flags = {name: bool(token[name]) for name in _FLAGS if token.get(name) is not None}
            yield {**flags, "content": _text(token), "id": _id(token_id)}
    except (AttributeError, TypeError, ValueError):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder must be an object of ids, each with "
            f"an object that has a content"
        ) from None
    try:
        for content, token_id in added.items():
            yield {"content": _text(content), "id": _id(token_id)}
    except (TypeError, ValueError):
        raise TokenizerError(
            f"{folder / 'added_tokens.json'}: expected an object of tokens with their ids"
        ) from None


def _without_ids(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    tokens = [config.get(name) for name in _NAMES]
    for several in (config.get(name) for name in _LISTS):  # an object names each, a list does not
        listed = list(several.values()) if isinstance(several, Mapping) else several
        tokens += listed if isinstance(listed, list) else []
    for token in tokens:
        content = token_text(token)
        if content is not None:
            yield {"content": content, "id": _NEXT}


def _text(token: Any) -> str:
    content = token_text(token)
    if content is None:
        raise ValueError
    return content


def _id(token_id: Any) -> int:
    number = int(token_id)
    if not 0 <= number < 2**31:
        raise ValueError
    return number
