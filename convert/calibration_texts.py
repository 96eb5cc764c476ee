"""The texts that a conversion is calibrated on: files, saved conversations, what the model writes itself."""

from dataclasses import dataclass

from convert.calibration.text import CalibrationText, TextsToRead, sequence_length, written_by
from convert.card.model_card import source_name
from convert.conversion import Conversion
from convert.options import ConvertOptions
from convert.progress import Notice, Progress, Stage
from convert.sampling.itself import Itself, is_written
from convert.sampling.model import Form
from convert.texts.saved import saved_conversations
from convert.writer.journal import Journal, SelfWritten
from olmo3_mlx.errors import Olmo3Error, OptionError
from olmo3_mlx.text.tokenizer import Tokenizer

# Whether the model writes text where nobody says on what to calibrate: one with a chat template, and others.
_WRITES_BY_DEFAULT = {True: True, False: False}


@dataclass(frozen=True)
class Texts:
    """Texts to calibrate on, some of which the model may still have to write: it, and in which form it does;
    None if it writes none.
    """

    to_read: TextsToRead
    itself: Itself | None = None
    form: Form | None = None

    @property
    def planned(self) -> CalibrationText:
        """What is going to be read, with zeros in the place of what the model writes."""
        return self.to_read.planned

    def read(self, journal: Journal, stage: Stage, progress: Progress) -> CalibrationText:
        """Let the model write its text, unless the journal has it from an earlier run; then cut all texts.
        `stage` is told of it, `progress` counts: see `Itself.written`.
        """
        if self.itself is None or self.form is None:
            return self.to_read.read()
        source, rows, written = self.itself.source, self.to_read.rows, journal.written
        if written is None or not is_written(written.ids, rows, self.itself.length, source.config.vocab_size):
            ids = self.itself.written(rows, self.form, stage, progress)
            written = SelfWritten(ids, self.form.bits)
            journal.record_written(written)
        return self.to_read.read(written_by(source_name(source.folder), *written))


def texts_to_calibrate_on(rounding: Conversion, options: ConvertOptions, notice: Notice) -> Texts:
    """The texts that `options` ask for. Where they name none the model writes some too, if it can: if not,
    `notice` is told why; and which saved conversations are left out, if those are asked for.

    Raises OptionError for texts that cannot be read or are too short, and for a model that is asked to write
    and cannot; PromptError for tokens outside the vocabulary, SessionError, TokenizerError, MemoryFitError.
    """
    files, source, folder = options.calibration_files, rounding.source, rounding.tokenizer_folder
    tokenizer = Tokenizer.from_folder(folder)
    saved = (saved_conversations(tokenizer, notice),) if options.calibrates_on_chats else ()
    by_default = files is None and _WRITES_BY_DEFAULT[bool(tokenizer.chat_templates)]
    if options.calibrates_on_itself or by_default:
        texts = TextsToRead.of(files, tokenizer, source.config, more=saved, written=True)
        try:
            itself = Itself.of(source, tokenizer, folder, sequence_length(source.config))
            return Texts(texts, itself, itself.form(texts.rows))
        except Olmo3Error as error:
            if options.calibrates_on_itself:
                raise
            notice(OptionError("calibrating on texts alone, as the model writes none: ", *error.parts))
    return Texts(TextsToRead.of(files, tokenizer, source.config, more=saved))
