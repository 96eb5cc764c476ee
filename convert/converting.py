"""Converting a checkpoint: the steps in their order, and the report."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Unpack

from convert.card.command import CompareCommand, own_name
from convert.card.comparison import Comparison
from convert.card.evaluation import EvaluationTexts
from convert.card.method import QuantizationMethod
from convert.card.quality import Quality
from convert.card.quality_card import write_card
from convert.conversion import Conversion
from convert.options import ConvertKeywords, ConvertOptions, check_type
from convert.preparing import calibrating, check_tokenizer, evaluation_texts, prepare
from convert.progress import Notice, Progress, Stage, untold
from convert.reading.source import Source
from convert.reading.stored import reading
from convert.saved_recipe import new_file, save
from convert.size import Size
from convert.writer.folder import check_apart, destination, new_folder, unfinished
from convert.writer.upload import check_login, upload
from olmo3_mlx.errors import Olmo3Error
from olmo3_mlx.memory.machine import small_buffer_pool

_SHARDS = "shards"  # of a model on the hub, until they are converted


@dataclass(frozen=True)
class Report:
    """The outcome of a conversion.

    parameters    the number of weights
    source_bytes  what the source's tensors take
    bytes         what the result's tensors take
    seconds       how long it took
    left_out      layers that are not quantized as the group size does not divide their inputs
    comparison    the result measured against the source, if it was
    no_card       why there is no quality card where one was to be made if possible
    tokenizer     whether the result has a tokenizer that can be read; without one it can neither read nor
                  write text
    """

    parameters: int
    source_bytes: int
    bytes: int
    seconds: float
    left_out: tuple[str, ...]
    comparison: Comparison | None = None
    no_card: Olmo3Error | None = None
    tokenizer: bool = True

    @property
    def bits_per_weight(self) -> float:
        """The bits of the whole result, scales and unquantized tensors included, over all weights."""
        return Size(self.parameters, self.bytes).bits_per_weight

    @property
    def quality(self) -> Quality | None:
        """The figures of the quality card, if the result was measured."""
        return None if self.comparison is None else self.comparison.quality

    @property
    def advice(self) -> tuple[str, ...]:
        """What to try if the quality is not good enough, the most promising first."""
        return () if self.comparison is None else self.comparison.advice

    @property
    def flattered(self) -> bool:
        """Whether the result was measured on a text that it was calibrated on."""
        return self.comparison is not None and self.comparison.flattered


def convert(
    source: str | Path,
    dest: str | Path,
    options: ConvertOptions | None = None,
    *,
    progress: Progress | None = None,
    stage: Stage | None = None,
    notice: Notice | None = None,
    **keywords: Unpack[ConvertKeywords],
) -> Report:
    """Write the checkpoint `source` (a folder, or a hub id at `revision`) to the new folder `dest`.

    Options are ConvertOptions, or keywords by the same names: convert(source, dest, bits=4).

    Linear layers, embedding and head are quantized by rounding to nearest: all to `bits`, with one scale for
    `group_size` weights in MLX's `mode`, or else as `recipe` says. With `bits` None and no recipe nothing is
    quantized, and a quantized source is dequantized. `dtype` casts the rest, scales included.

    With `calibrate` (True, a text file or several) weights are rounded so that blocks give nearly the same
    outputs on texts as the original's; and unless there is a recipe, layers that matter more get more bits
    at the same size. `target_bpw` does so for that many bits per weight in all, instead of `bits`,
    `target_gb` for at most so many GB (10^9 bytes). With a recipe its plan is calibrated as it is. Of
    several files each is read as much, as far as it has; a .jsonl file holds conversations, one a line,
    {"messages": [...], "tools": [...]} in OpenAI's form, which go through the checkpoint's template. "self"
    among them is what the model writes itself: conversations by its template, or without one whatever it
    goes on with; True includes it where there is a template. "chats" is all conversations that are saved on
    this machine, through the template, too. (Files of those names are ./self and ./chats.)

    `save_recipe` is a new file, to which the bits of each layer are written as soon as they are known: a
    recipe for checkpoints of the same model, which share them. So is the folder of any quantized checkpoint.

    `dest` appears when it is complete and was read back. A run that was killed leaves a hidden folder
    beside it, in which `resume` goes on, to the same bytes. Without `calibrate` memory stays at some rows
    of the largest tensor. Of a model on the hub a file is fetched when it is needed; with `keep` False it
    is removed when it was converted: the disk holds one of them at most. `tokenizer` is a checkpoint to
    take tokenizer and chat template from: OLMo-core's own have none. With `card` the result is measured
    against the source on a `text` file or several, or on those that come with this, and gets QUALITY.md;
    None means if it can be. `upload_to` names a repository on the hub to put it in.

    `stage(title)` says what begins, a stage and behind a comma what part of it. `progress(done, total)`
    counts within the stage, from its beginning to its end, never back:

        reading the weights                    weights that were read
        loading the original                   weights that were read, for "self"
        sampling from the original, 16,384 tokens, about 3 min    tokens
        choosing bits, layer 3 of 32           weights that hidden states went through
        weighing bits against each other       layers
        checking what is there                 bytes that were written before and read back
        converting                             bytes written, those of an earlier run included
        calibrating, layer 3 of 32             bytes calibrated, or gone past as they were written before
        reading back                           bytes of the result
        measuring                              weights of source and result
        uploading                              nothing

    The first five and `calibrating` are there with `calibrate` or a target only; `choosing bits` and
    `calibrating` say behind another comma how long the stage will still take, once its first layer is done
    and where that is minutes: "calibrating, layer 3 of 32, about 12 min left". `notice(error)` is
    told, before the long work, what does not hinder it and will be missed: a tokenizer that cannot be read,
    saved conversations that are left out.

    Raises OptionError for options of a wrong type, with unknown values, or that exclude each other;
    ConfigError, CheckpointError or HubError for a source that cannot be read or holds NaN; ConvertError for
    one that is quantized already, a recipe that does not fit it, and a destination that exists, cannot be
    written or lies in the source; TypeError for a keyword that is no option.
    """
    _check_arguments(source, dest, progress, stage, notice)
    options = ConvertOptions.of(options, **keywords)
    begin = time.perf_counter()
    progress, stage, notice = progress or untold, stage or untold, notice or untold
    if options.upload_to is not None:
        check_login(options.upload_to)
    dest = destination(dest)
    check_apart(dest, source, *([] if options.tokenizer is None else [options.tokenizer]))
    recipe_file = _recipe_file(options, dest)
    with new_folder(dest, resume=options.resume) as folder, small_buffer_pool():
        original = Source.open(source, options.revision, None if options.keep else folder / _SHARDS)
        with reading(original.folder):
            conversion = prepare(original, options)
            talks = check_tokenizer(conversion, notice)
            texts, no_card = evaluation_texts(conversion, options)
        conversion = calibrating(conversion, options, folder, notice, stage=stage, progress=progress)
        if recipe_file is not None:
            save(recipe_file, conversion.recipe())
        conversion.write(folder, progress, stage)
        comparison = None
        if texts is not None:
            stage("measuring")
            command = _compare_command(source, dest, texts, options)
            comparison, no_card = _measured(
                conversion, folder, texts, command, options=options, progress=progress
            )
        conversion.describe(folder, options.upload_to or dest.name, None if no_card else comparison)
        shutil.rmtree(folder / _SHARDS, ignore_errors=True)
    if options.upload_to is not None:
        upload(dest, options.upload_to, stage)
    return Report(
        parameters=original.parameters,
        source_bytes=original.size.bytes,
        bytes=conversion.size.bytes,
        seconds=time.perf_counter() - begin,
        left_out=conversion.plan.left_out,
        comparison=comparison,
        no_card=no_card,
        tokenizer=talks,
    )


def _check_arguments(source: object, dest: object, progress: object, stage: object, notice: object) -> None:
    check_type("source", source, (str, Path), "a folder or a hub id")
    check_type("dest", dest, (str, Path), "a folder")
    for name, value in (("progress", progress), ("stage", stage), ("notice", notice)):
        check_type(name, value, (Callable, NoneType), "a function or None")  # type: ignore[arg-type]


def _recipe_file(options: ConvertOptions, dest: Path) -> Path | None:
    """Where the plan is to be saved, if it is. Raises ConvertError for where it cannot be."""
    if options.save_recipe is None:
        return None
    return new_file(options.save_recipe, dest, unfinished(dest), resume=options.resume)


def _measured(
    conversion: Conversion,
    folder: Path,
    texts: EvaluationTexts,
    command: CompareCommand,
    *,
    options: ConvertOptions,
    progress: Progress,
) -> tuple[Comparison | None, Olmo3Error | None]:
    """Measure the result in `folder`, and write its quality card. Where either fails the result is whole all
    the same: then the error says why there is no card.
    """
    comparison = None
    try:
        comparison = conversion.measure(
            folder, texts, command, _method(conversion, options), progress=progress
        )
        write_card(folder, comparison)
    except Olmo3Error as error:
        return comparison, error
    return comparison, None


def _method(conversion: Conversion, options: ConvertOptions) -> QuantizationMethod:
    """The method by which the result is quantized, as advice on it needs it."""
    plan, calibration, scheme = conversion.plan, conversion.calibration, options.schemes.default
    tensors = conversion.source.tensors
    return QuantizationMethod(
        plan.layers,
        options.chosen_by,
        scheme.bits if options.chosen_by == "bits" and scheme else None,
        calibrated=calibration is not None,
        calibrated_on=None if calibration is None else calibration.described,
        left_out={path: tensors[f"{path}.weight"].shape[1] for path in plan.left_out},
    )


def _compare_command(
    source: str | Path, dest: Path, texts: EvaluationTexts, options: ConvertOptions
) -> CompareCommand:
    """The command that measures the same again, by names as a card says them. A tokenizer that is not the
    source's is in the result.
    """
    each = texts.texts[0]
    return CompareCommand(
        own_name(source),
        dest.name,
        tokens=each.tokens,
        length=each.length,
        text=None if options.text_files is None else tuple(map(own_name, options.text_files)),
        tokenizer=None if options.tokenizer is None else dest.name,
        revision_a=options.revision,
    )
