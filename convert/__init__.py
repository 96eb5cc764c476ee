"""Checkpoints to MLX form, a few rows at a time: read, quantize, write, read back.

from convert import convert
print(convert("allenai/Olmo-3-7B-Instruct", "olmo3-7b-4bit", bits=4).bits_per_weight)
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType

from convert.card.evaluation import Evaluation
from convert.card.page import called
from convert.card.quality import Quality
from convert.card.verdict import Quantized, advice
from convert.conversion import Conversion
from convert.options import check_options
from convert.preparing import Wishes, evaluation, planned, words_of
from convert.progress import Progress, Stage
from convert.reading.source import Source
from convert.recipe import Recipe, uniform
from convert.recipe import named as recipe_named
from convert.size import Size
from convert.writer.folder import destination, new_folder
from convert.writer.upload import check_upload, upload
from olmo3_mlx.checkpoints.checkpoint import dtype_named
from olmo3_mlx.memory.machine import little_kept

__all__ = ["Report", "convert"]

_SHARDS = "shards"  # of a model on the hub, until they are converted


@dataclass(frozen=True)
class Report:
    """What a conversion made. `left_out` names layers that the group size does not divide; `quality` is
    what the card says, `advice` what to try if that is not good, `no_card` why there is none where one was
    to be made if possible; `flattered`, whether it was measured on the text that it was calibrated on.
    Without a `tokenizer` the result can neither read nor write text.
    """

    parameters: int
    source_bytes: int
    bytes: int
    seconds: float
    left_out: tuple[str, ...]
    quality: Quality | None = None
    no_card: str = ""
    advice: tuple[str, ...] = ()
    flattered: bool = False
    tokenizer: bool = True

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole result, scales and unquantized tensors included, over all weights."""
        return Size(self.parameters, self.bytes).bits_per_weight


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    bits: int | EllipsisType | None = ...,
    group_size: int | None = None,
    mode: str = "affine",
    recipe: str | Path | None = None,
    dtype: str | None = None,
    calibrate: bool | str | Path = False,
    target_bpw: float | None = None,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    resume: bool = False,
    keep: bool = True,
    card: bool | None = False,
    text: str | Path | None = None,
    upload_to: str | None = None,
    progress: Progress | None = None,
    stage: Stage | None = None,
) -> Report:
    """Write the checkpoint `source` (a folder, or a hub id at `revision`) to the new folder `dest`.

    Linear layers, embedding and head are quantized by rounding to nearest: all to `bits` (left out: 4, or 8
    in mxfp8), with one scale for `group_size` weights (64, or what the mode has) in MLX's `mode`, or else as
    `recipe` says, one of RECIPES or a TOML file (see convert.recipe). With `bits` None and no recipe nothing
    is quantized, and a quantized source is dequantized. `dtype` casts the rest, scales included.

    With `calibrate` (True, or a text file) weights are not rounded to nearest, but so that blocks do to a
    text what the original's do; and unless there is a recipe, layers that matter more get more bits at
    the same size. `target_bpw` does so for that many bits per weight in all, instead of `bits`.

    `dest` appears when it is complete and was read back. A run that was killed leaves a hidden folder
    beside it, in which `resume` goes on, to the same bytes. `progress(done, total)` counts bytes written,
    `stage(what)` says in words what begins. Without `calibrate` memory stays at some rows of the largest
    tensor. Of a model on the hub a file is fetched when it is needed; with `keep` False it goes when it was
    converted: the disk holds one of them at most. `tokenizer` is a checkpoint to take tokenizer and chat
    template from: OLMo-core's own have none. With `card` the result is measured against the source on a
    `text` file, or on one that comes with this, and gets QUALITY.md; None means if it can be. `upload_to`
    names a repository on the hub to put it in.

    Raises OptionError for options of other types, or that do not exist or go together; ConfigError,
    CheckpointError or HubError for a source that cannot be read or holds NaN; ConvertError for one that
    is quantized already, a recipe that does not fit it, and a destination that exists or cannot be written.
    """
    options = check_options(locals())
    begin = time.perf_counter()
    progress, stage = progress or (lambda done, total: None), stage or (lambda what: None)
    how, cast = _recipe(bits, group_size, mode, recipe), None if dtype is None else dtype_named(dtype)
    wishes = Wishes(calibrate, target_bpw, recipe is not None, options)
    wishes.check(bits, keep)
    check_upload(upload_to)
    dest = destination(dest)
    with new_folder(dest, resume=resume) as folder, little_kept():
        origin = Source.open(source, revision, None if keep else folder / _SHARDS)
        words = origin.folder if tokenizer is None else words_of(tokenizer)
        work = planned(origin, how, cast, words, wishes=wishes, folder=folder, stage=stage)
        measured_on, no_card = evaluation(work, words, text, card, keep=keep)
        work.write(folder, words, progress, stage)
        quality, made = None, _quantized(work, how, recipe, target_bpw)
        if measured_on is not None:
            again = _again(source, dest, measured_on, tokenizer, revision)
            quality, no_card = work.measure(folder, measured_on, again, made, stage=stage)
        work.describe(folder, upload_to or dest.name, None if no_card else quality)
        shutil.rmtree(folder / _SHARDS, ignore_errors=True)
    if upload_to is not None:
        upload(dest, upload_to, stage)
    seconds = time.perf_counter() - begin
    return _report(work, made, measured_on, dest, seconds=seconds, quality=quality, no_card=no_card)


def _report(
    work: Conversion,
    made: Quantized,
    measured_on: Evaluation | None,
    dest: Path,
    *,
    seconds: float,
    quality: Quality | None,
    no_card: str,
) -> Report:
    return Report(
        parameters=work.source.parameters,
        source_bytes=work.source.size.bytes,
        bytes=work.size.bytes,
        seconds=seconds,
        left_out=work.plan.left_out,
        quality=quality,
        no_card=no_card,
        advice=() if quality is None else advice(quality, made),
        flattered=measured_on is not None and made.saw(measured_on.text_sha256),
        tokenizer=(dest / "tokenizer.json").is_file(),
    )


def _quantized(
    work: Conversion, how: Recipe, recipe: str | Path | None, target_bpw: float | None
) -> Quantized:
    by = "recipe" if recipe is not None else "bits" if target_bpw is None else "target"
    return Quantized(
        work.plan.layers,
        by,
        how.default.bits if by == "bits" and how.default else None,
        calibrated=work.tokens is not None,
        on=work.on,
        left_out={path: work.source.tensors[f"{path}.weight"].shape[1] for path in work.plan.left_out},
    )


def _recipe(
    bits: int | EllipsisType | None, group_size: int | None, mode: str, recipe: str | Path | None
) -> Recipe:
    if recipe is not None:
        return recipe_named(recipe)
    if bits is None:
        return Recipe(None)
    return Recipe(uniform(None if isinstance(bits, EllipsisType) else bits, group_size, mode))


def _again(
    source: str | Path,
    dest: Path,
    measured_on: Evaluation,
    tokenizer: str | Path | None,
    revision: str | None,
) -> list[str]:
    """The command that measures the same again, by names as a card says them. A tokenizer that is not the
    source's is in the result.
    """
    words = ["olmo3", "compare", called(source), dest.name, *measured_on.options]
    words += [] if tokenizer is None else ["--tokenizer", dest.name]
    return words if revision is None else [*words, "--revision-a", revision]
