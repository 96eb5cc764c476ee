"""Everything that a user can cause, as one tree.

    Olmo3Error                 catch this one to catch them all
    ├── ConfigError            config.json: a value that cannot be, or that we do not understand
    ├── CheckpointError        files and tensors: missing, damaged, misshapen, not finite
    │   └── HubError           the hub did not give it: unknown, gated, or out of reach
    ├── TokenizerError         tokenizer files
    │   └── TemplateError      no chat template, or one that fails
    ├── PromptError            empty, too long, or with an id outside the vocabulary
    ├── CacheError             a cache asked for what it no longer holds
    ├── SessionError           a saved conversation that cannot be used, or not be saved
    ├── MemoryFitError         what was asked for does not fit the machine's memory
    ├── ConvertError           a conversion that cannot be made, or could not be finished
    └── OptionError            an option outside its range (also a ValueError)

Every message is one line: what was expected, what came, what to do.
"""


class Olmo3Error(Exception):
    """The root of all errors that this project raises on purpose. Its message is made one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines() if line.strip()))


class ConfigError(Olmo3Error):
    """config.json or generation_config.json says what cannot be, or what we do not understand."""


class CheckpointError(Olmo3Error):
    """A checkpoint's files or tensors are missing, damaged, misshapen or not finite."""


class HubError(CheckpointError):
    """The hub did not give what was asked for."""


class TokenizerError(Olmo3Error):
    """The tokenizer's files are missing or damaged."""


class TemplateError(TokenizerError):
    """The checkpoint has no chat template, or its template failed."""


class PromptError(Olmo3Error):
    """A prompt that the model cannot be given."""


class CacheError(Olmo3Error):
    """A cache was asked for what it no longer holds; nothing was changed."""


class SessionError(Olmo3Error):
    """A saved conversation, or what was kept of its caches, cannot be used or not be saved."""


class MemoryFitError(Olmo3Error):
    """Weights, caches and working space do not fit the machine; the nearest that fit are named."""


class ConvertError(Olmo3Error):
    """A conversion that cannot be made, or could not be finished; nothing is left behind."""


class OptionError(Olmo3Error, ValueError):
    """An option outside its range."""
