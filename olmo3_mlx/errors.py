"""Everything that a user can cause, as one tree.

    Olmo3Error                 catch this one to catch them all
    ├── ConfigError            config.json: a value that cannot be, or that we do not understand
    ├── CheckpointError        files and tensors: missing, damaged, misshapen, not finite
    │   ├── UnknownNameError   a name that is neither a folder nor a hub id
    │   └── HubError           the hub did not give it: unknown, gated, or out of reach
    │       └── UnknownRevisionError    a model that has no such branch, tag or commit
    ├── TokenizerError         tokenizer files
    │   └── TemplateError      no chat template, or one that fails
    │       └── NoTemplateError    there is none
    ├── PromptError            empty, too long, or with an id outside the vocabulary
    ├── CacheError             a cache asked for what it no longer holds
    ├── SessionError           a saved conversation that cannot be used, or not be saved
    │   ├── CachesNotSavedError    what was said is saved, what the caches hold is not
    │   └── OtherCachesError       what is kept of caches is of another model or form
    ├── MemoryFitError         what was asked for does not fit the machine's memory
    ├── ConvertError           a conversion that cannot be made, or could not be finished
    └── OptionError            an option outside its range (also a ValueError)

Every message is one line: what was expected, what came, what to do. Options are Settings in it, so that
a face can spell them in its own way: `kv_bits=8` in Python is `--kv-bits 8` on the command line.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """An option that an error speaks of, and its value where that matters: `context`, `kv_bits=8`."""

    name: str
    value: object = ...

    def __str__(self) -> str:
        """As Python spells it."""
        return self.name if self.value is ... else f"{self.name}={self.value!r}"


class Olmo3Error(Exception):
    """The root of all errors that this project raises on purpose. Its message is one line."""

    def __init__(self, *parts: str | Setting) -> None:
        """`parts` follow each other in the message, with no space added."""
        self.parts = parts
        super().__init__(self.worded(str))

    def worded(self, spell: Callable[[Setting], str]) -> str:
        """The message with each Setting as `spell` writes it."""
        message = "".join(spell(part) if isinstance(part, Setting) else part for part in self.parts)
        return " ".join(line.strip() for line in message.splitlines() if line.strip())


class ConfigError(Olmo3Error):
    """config.json or generation_config.json says what cannot be, or what we do not understand."""


class CheckpointError(Olmo3Error):
    """A checkpoint's files or tensors are missing, damaged, misshapen or not finite."""


class UnknownNameError(CheckpointError):
    """`name` is neither a folder nor a hub id."""

    def __init__(self, name: str, *parts: str | Setting) -> None:
        self.name = name
        super().__init__(*parts)


class HubError(CheckpointError):
    """The hub did not give what was asked for."""


class UnknownRevisionError(HubError):
    """The model `hub_id` has no branch, tag or commit `revision`."""

    def __init__(self, hub_id: str, revision: str | None) -> None:
        self.hub_id, self.revision = hub_id, revision
        super().__init__(f"{hub_id} has no revision {revision!r}")


class TokenizerError(Olmo3Error):
    """The tokenizer's files are missing or damaged."""


class TemplateError(TokenizerError):
    """The checkpoint has no chat template, or its template failed."""


class NoTemplateError(TemplateError):
    """The checkpoint has no chat template, as base models have none: it continues plain text."""

    def __init__(self) -> None:
        super().__init__(
            "this checkpoint has no chat template (base models have none): continue plain text with ",
            Setting("raw", True),
        )


class PromptError(Olmo3Error):
    """A prompt that the model cannot be given."""


class CacheError(Olmo3Error):
    """Caches do not fit: another number or form of them, or what they no longer hold. Nothing was changed."""


class SessionError(Olmo3Error):
    """A saved conversation, or what was kept of its caches, cannot be used or not be saved."""


class CachesNotSavedError(SessionError):
    """What was said is saved, and what the caches hold is not: a restart has to read it again."""


class OtherCachesError(SessionError):
    """What is kept of caches is of another model, or of caches in another form.

    `differing` says in what: "format", "model" or "form", one or more of them.
    """

    def __init__(self, differing: Sequence[str], *parts: str | Setting) -> None:
        self.differing = tuple(differing)
        super().__init__(*parts)


class MemoryFitError(Olmo3Error):
    """What was asked for does not fit the machine's memory.

    `needed` and `available` are in bytes, None where they are not known. `nearest` are changes each of which
    would fit, as settings: `context`, `kv_bits`, and `weight_bits`, the bits of the model's weights.
    """

    def __init__(
        self,
        *parts: str | Setting,
        needed: int | None = None,
        available: int | None = None,
        nearest: Sequence[Mapping[str, int]] | None = None,
    ) -> None:
        self.needed, self.available, self.nearest = needed, available, nearest or ()
        super().__init__(*parts, *([] if nearest is None else _what_fits(nearest)))


def _what_fits(nearest: Sequence[Mapping[str, int]]) -> Iterator[str | Setting]:
    """The end of a refusal: the changes that would fit, in words."""
    if not nearest:
        yield "nothing fits but a smaller model"
    for place, change in enumerate(nearest):
        yield ", or " if place else "what fits is "
        for also, (name, value) in enumerate(change.items()):
            yield " with " if also else ""
            yield f"weights of {value} bits" if name == "weight_bits" else Setting(name, value)


class ConvertError(Olmo3Error):
    """A conversion that cannot be made, or could not be finished; what can be gone on with is kept."""


class OptionError(Olmo3Error, ValueError):
    """An option outside its range."""
