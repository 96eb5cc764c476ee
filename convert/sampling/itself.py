"""A checkpoint that writes text itself: which rows it is asked for, and what comes of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from convert.progress import Count, Progress, Stage
from convert.reading.source import Source
from convert.sampling.loop import sampled
from convert.sampling.model import Form, form_that_fits, read_model
from convert.sampling.rows import Conversations, Documents, Row
from convert.sampling.script import Script, script_of
from convert.texts.shipped import calibration_tools
from olmo3_mlx.config import GenerationConfig
from olmo3_mlx.errors import OptionError, TemplateError
from olmo3_mlx.fields import read_json
from olmo3_mlx.text.tokenizer import Tokenizer
from olmo3_mlx.token_ids import check_token_ids

_STAGE = "sampling from the original"
_TOOLS_EVERY = 3  # rows, of which one has tools
_SHARE = 2  # at most one in so many tokens of a row is taken by the opening of a conversation


@dataclass(frozen=True)
class Itself:
    """A checkpoint as a writer of rows of `length` tokens.

    scripts  of its conversations: without tools, then with some; empty if it has no template
    ends     tokens that end what it says; without a template the first begins a text
    """

    source: Source
    tokenizer: Tokenizer
    scripts: tuple[Script, ...]
    ends: tuple[int, ...]
    length: int

    @classmethod
    def of(cls, source: Source, tokenizer: Tokenizer, folder: Path, length: int) -> "Itself":
        """The checkpoint `source` with a tokenizer, which is that in `folder`.

        Raises OptionError for a checkpoint that cannot be asked: its template does not show what is said, or
        fills a row; or it has neither a template nor an end token. Raises PromptError for a tokenizer of
        another vocabulary.
        """
        ends = _ends(source, tokenizer, folder)
        scripts = _scripts(tokenizer, length) if tokenizer.chat_templates else ()
        if not scripts and not ends:
            raise OptionError(
                "a checkpoint without a chat template writes on from its end token, and this one names none "
                "(eos_token in tokenizer_config.json, or eos_token_id in config.json): name it, or "
                "calibrate on texts"
            )
        check_token_ids([*ends, *(i for script in scripts for i in script.ids)], source.config.vocab_size)
        return cls(source, tokenizer, scripts, ends, length)

    def form(self, rows: int) -> Form:
        """The form in which it fits this machine while it writes so many rows. Raises MemoryFitError."""
        return form_that_fits(self.source, rows, self.length)

    def written(self, count: int, form: Form, stage: Stage, progress: Progress) -> list[list[int]]:
        """Let it write `count` rows of ids, [count, length]: a function of the checkpoint, but for rounding.
        `stage` is told of it, `progress` counts weights that are read, then tokens.
        """
        stage("loading the original")
        model = read_model(self.source, form, progress)
        title = f"{_STAGE}{form.in_words}, {count * self.length:,} tokens"
        stage(title)
        try:
            return sampled(
                model,
                [self._row(place) for place in range(count)],
                self.length,
                form.rows,
                passed=Count(count * self.length, progress),
                remaining=lambda seconds: stage(f"{title}, about {_in_words(seconds)}"),
            )
        finally:
            del model
            mx.clear_cache()

    def _row(self, place: int) -> Row:
        if not self.scripts:
            return Documents(self.ends[0])
        plain, *with_tools = self.scripts
        turn, rest = divmod(place, _TOOLS_EVERY)
        use_tools = with_tools and rest == _TOOLS_EVERY - 1
        script = with_tools[turn % len(with_tools)] if use_tools else plain
        ends = script.ends.union(self.ends)
        return Conversations(script, ends, self.tokenizer.decode, length=self.length, seed=place)


def _scripts(tokenizer: Tokenizer, length: int) -> tuple[Script, ...]:
    """The script without tools, then those with each of the shipped conversations' tools, if the template
    shows them and a row has room for them.
    """
    try:
        plain = script_of(tokenizer)
    except TemplateError as error:
        raise OptionError("the model cannot write conversations: ", *error.parts) from None
    opening = len(plain.start)
    if opening == 0:
        raise OptionError(
            "the checkpoint's chat template puts nothing before the user's words, so that the model has "
            "nothing to go on from: calibrate on texts"
        )
    if _SHARE * opening > length:
        raise OptionError(
            f"the checkpoint's chat template takes {opening} tokens before the user's words, of the {length} "
            "of a sequence: it is too long for the model to write conversations: calibrate on texts"
        )
    found = [plain]
    for tools in calibration_tools():
        try:
            script = script_of(tokenizer, tools)
        except (OptionError, TemplateError):
            continue
        if (script.start, script.answer) != (plain.start, plain.answer) and (
            0 < _SHARE * len(script.start) <= length
        ):
            found.append(script)
    return tuple(found)


def _ends(source: Source, tokenizer: Tokenizer, folder: Path) -> tuple[int, ...]:
    """The tokens that end a text, those of the tokenizer first."""
    ends = [*tokenizer.eos_token_ids, *source.config.eos_token_ids]
    for place in dict.fromkeys((source.folder, folder)):
        path = place / "generation_config.json"
        if path.is_file():
            ends += GenerationConfig.from_dict(read_json(path), where=str(path)).eos_token_ids
    return tuple(dict.fromkeys(ends))


def _in_words(seconds: float) -> str:
    """A time as people say it that is not known exactly."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def is_written(ids: Sequence[Sequence[int]], count: int, length: int, vocab_size: int) -> bool:
    """Whether ids that were kept are `count` rows of `length` from this vocabulary."""
    return len(ids) == count and all(
        len(row) == length and all(0 <= i < vocab_size for i in row) for row in ids
    )
