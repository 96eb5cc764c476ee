"""Where a checkpoint keeps its chat templates, one or several: in files, or in tokenizer_config.json."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olmo3_mlx.errors import TemplateError
from olmo3_mlx.git_lfs import refuse_pointer
from olmo3_mlx.text.added_tokens import token_text
from olmo3_mlx.text.chat_template import ChatTemplate

DEFAULT = "default"
TOOL_USE = "tool_use"  # taken where there are tools
FILE = "chat_template.jinja"
MORE_FILES = "additional_chat_templates"  # a folder of others, NAME.jinja each


def read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """A checkpoint's templates by name; `config` is what tokenizer_config.json says.

    Files override the config, as in transformers. A template that cannot be read raises TemplateError when it
    is used, no sooner: much can be done without one.
    """
    special_tokens = _special_tokens(config)
    sources = _of_files(folder) or _of_config(folder, config)
    return {name: ChatTemplate(source, special_tokens) for name, source in sources.items()}


def _of_files(folder: Path) -> dict[str, str | TemplateError]:
    files = {DEFAULT: folder / FILE} if os.path.lexists(folder / FILE) else {}
    files |= {path.stem: path for path in sorted(folder.glob(f"{MORE_FILES}/*.jinja"))}
    return {name: _read(path) for name, path in files.items()}


def _read(path: Path) -> str | TemplateError:
    try:
        refuse_pointer(path, TemplateError)
        return path.read_text(encoding="utf-8-sig")
    except TemplateError as error:
        return error
    except OSError as error:
        dangling = path.is_symlink() and not path.exists()
        reason = "it is a link to nothing: fetch the file again" if dangling else error.strerror
        return TemplateError(f"{path}: the chat template could not be read: {reason}")
    except ValueError as error:
        return TemplateError(f"{path}: the chat template could not be read: {error}")


def _of_config(folder: Path, config: Mapping[str, Any]) -> dict[str, str | TemplateError]:
    """One text; or several by name, in an object or in a list of objects."""
    found = config.get("chat_template")
    if not found:
        return {}
    entries = found if isinstance(found, list) else [{"name": DEFAULT, "template": found}]
    if isinstance(found, dict):
        entries = [{"name": name, "template": text} for name, text in found.items()]
    named: dict[str, str | TemplateError] = {}
    for entry in entries:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            said = "chat_template must be a text, or a list of named ones"
            return {DEFAULT: TemplateError(f"{folder / 'tokenizer_config.json'}: {said}")}
        named[name] = text
    return named


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, as templates name them."""
    texts = {key: token_text(value) for key, value in config.items() if key.endswith("_token")}
    return {key: text for key, text in texts.items() if text is not None}
