"""Text to token ids and back, with the checkpoint's own tokenizer.json and chat template."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from olmo3_mlx.errors import ConfigError, NoTemplateError, PromptError, TemplateError, TokenizerError
from olmo3_mlx.fields import read_json
from olmo3_mlx.git_lfs import refuse_pointer
from olmo3_mlx.text.added_tokens import token_text, with_named_tokens
from olmo3_mlx.text.chat_template import ChatTemplate
from olmo3_mlx.text.client_messages import Message
from olmo3_mlx.text.template_files import DEFAULT, TOOL_USE, read_templates


class Tokenizer:
    """What a checkpoint's tokenizer files say. Nothing is hidden in either direction: special tokens
    in a text become their ids, and ids of special tokens their text.
    """

    def __init__(
        self,
        backend: Backend,
        chat_template: ChatTemplate | Mapping[str, ChatTemplate] | None = None,
        *,
        eos_token: str | None = None,
    ) -> None:
        """`chat_template` is one, or several by name; `eos_token` the text of the token that ends a text."""
        self.backend = backend
        self.chat_templates: Mapping[str, ChatTemplate] = (
            {DEFAULT: chat_template} if isinstance(chat_template, ChatTemplate) else chat_template or {}
        )
        eos = None if eos_token is None else backend.token_to_id(eos_token)
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)
        self._special = frozenset(backend.get_added_tokens_decoder())  # they split a text

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json, the tokens that files beside it add, and the chat templates, if there are any.

        Raises TokenizerError for missing or damaged files. A template that is none shows when it is used.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{folder}: expected a tokenizer.json, found none: copy the model's")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            refuse_pointer(path, TokenizerError)
            raise TokenizerError(f"{path}: not a tokenizer that can be read: {error}") from None
        config = _config(folder)
        backend = with_named_tokens(backend, path, config, _json(folder / "added_tokens.json"))
        # Some fine-tunes ship a file that cuts or pads what it encodes; a prompt is a prompt.
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, read_templates(folder, config), eos_token=token_text(config.get("eos_token")))

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The template that is taken where nothing else is asked for; None if there is none."""
        return self.chat_templates.get(DEFAULT)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens that stand in it count as such, none are added.

        Raises PromptError for text that is not valid Unicode.
        """
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise PromptError("expected valid Unicode text, got lone surrogates") from None

    def encode_like(self, text: str, held: Sequence[int]) -> list[int]:
        """Ids of a text, spelled as in `held` as far as that is the same text: a model may have chosen
        other tokens for its words than `encode` does, and they need not be run again.

        Between special tokens, where spelling is free, what `held` has is taken as far as it is the text
        that stands here, to the last word that both have whole. Raises what `encode` raises.
        """
        ids, at = self.encode(text), 0
        while True:
            at = next((i for i in range(at, min(len(ids), len(held))) if ids[i] != held[i]), -1)
            if at < 0:
                return ids
            begin = next((i + 1 for i in range(at - 1, -1, -1) if ids[i] in self._special), 0)
            ours = ids[begin : self._stretch(ids, begin)]
            end = self._stretch(held, begin)
            said, meant = held[begin:end], self.decode(ours)
            taken, length = self._common(said, meant, last=end == len(held))
            if begin + taken <= at:
                return ids
            rest = self.encode(meant[length:])
            ids = [*ids[:begin], *said[:taken], *rest, *ids[begin + len(ours) :]]
            if taken < len(said):
                return ids
            at = begin + taken

    def _common(self, said: Sequence[int], meant: str, last: bool) -> tuple[int, int]:
        """How many ids of `said` spell the beginning of `meant`, and how long that is. Unless that is all
        that was said, it ends before a word, where `encode` may go on; `last` says that nothing follows.
        """
        detokenizer, text, found = self.detokenizer(), "", (0, 0)
        for count, token in enumerate(said, start=1):
            piece = detokenizer.add(token)
            if not piece:  # in the middle of a character
                continue
            text += piece
            if not meant.startswith(text):
                return found
            if not meant[len(text) :] or meant[len(text)].isspace():
                found = (count, len(text))
        whole = self.decode(said)
        return (len(said), len(whole)) if meant == whole or (last and meant.startswith(whole)) else found

    def _stretch(self, ids: Sequence[int], begin: int) -> int:
        """Where the next special token from `begin` on stands, or the end."""
        return next((i for i in range(begin, len(ids)) if ids[i] in self._special), len(ids))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: str | None = None,
    ) -> str:
        """The prompt text of a conversation, see ChatTemplate.render. `template` names one of several; left
        out it is "tool_use" if there are tools and such a template, else "default".

        Raises NoTemplateError if the checkpoint has no template (base models have none), TemplateError for a
        name that it does not have and for a template that fails.
        """
        return self._template(template, tools).render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def check_chat_template(self) -> None:
        """Raise NoTemplateError if there is no chat template, TemplateError if it renders no message."""
        self.apply_chat_template([{"role": "user", "content": "Hello"}])

    def _template(self, name: str | None, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate:
        if not self.chat_templates:
            raise NoTemplateError
        if name is None:  # as transformers chooses
            name = TOOL_USE if tools is not None and TOOL_USE in self.chat_templates else DEFAULT
        if name not in self.chat_templates:
            raise TemplateError(
                f"this checkpoint has no chat template of the name {name}: expected one of "
                f"{', '.join(sorted(self.chat_templates))}"
            )
        return self.chat_templates[name]

    def detokenizer(self) -> "Detokenizer":
        """A fresh streaming detokenizer."""
        return Detokenizer(self.backend)


class Detokenizer:
    """Ids to text one at a time, in whole characters: the pieces together are `Tokenizer.decode`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._length = 0  # characters given out

    def add(self, token: int) -> str:
        """The text that this id completes, empty while a character is unfinished."""
        self._ids.append(token)
        piece: str = self._stream.step(self._backend, token) or ""
        self._length += len(piece)
        return piece

    def finish(self) -> str:
        """What is left at the end: U+FFFD where a character was never finished."""
        rest: str = self._backend.decode(self._ids, skip_special_tokens=False)[self._length :]
        self._length += len(rest)
        return rest


def _config(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says. As in transformers, special_tokens_map.json overrides it where it is
    of the older form, without `added_tokens_decoder`; else that adds what it leaves out.
    """
    config, names = (
        {key: value for key, value in _json(folder / name).items() if value is not None}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    return {**names, **config} if "added_tokens_decoder" in config else {**config, **names}


def _json(path: Path) -> dict[str, Any]:
    """What a file says, nothing if there is none."""
    try:
        return read_json(path) if path.is_file() else {}
    except ConfigError as error:
        raise TokenizerError(str(error)) from None
