"""Checkpoints to MLX form, a few rows at a time: read, quantize, write, read back.

from convert import convert
print(convert("allenai/Olmo-3-7B-Instruct", "olmo3-7b-4bit", bits=4).bits_per_weight)
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from convert.conversion import Conversion
from convert.evaluation import CALIBRATION_TEXT, Evaluation, read_text, text_tokens
from convert.folder import new_folder
from convert.pipeline import Progress
from convert.quality import Quality
from convert.recipe import Plan, Recipe, uniform
from convert.recipe import named as recipe_named
from convert.sensitivity import choose
from convert.source import Source
from convert.upload import check_upload, upload
from olmo3_mlx.checkpoint import dtype_named
from olmo3_mlx.errors import ConvertError, Olmo3Error, OptionError
from olmo3_mlx.hub import resolve
from olmo3_mlx.model import Olmo3, check_token_ids
from olmo3_mlx.tokenizer import Tokenizer

__all__ = ["Report", "convert"]

_CALIBRATION_TOKENS = 8192  # in sequences of _LENGTH
_SENSITIVITY_TOKENS = 1024  # of those, on which layers are weighed against each other
_TOKENS, _LENGTH = 2048, 512  # that a card is measured on, in sequences of so many
_SHARDS = "shards"  # of a model on the hub, until they are converted


@dataclass(frozen=True)
class Report:
    """What a conversion made. `left_out` names layers that the group size does not divide; `quality` is
    what the card says, `no_card` why there is none where one was to be made if possible.
    """

    parameters: int
    source_bytes: int
    bytes: int
    seconds: float
    left_out: tuple[str, ...]
    quality: Quality | None = None
    no_card: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole result, scales and unquantized tensors included, over all weights."""
        return self.bytes * 8 / self.parameters


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    bits: int | None = 4,
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
) -> Report:
    """Write the checkpoint `source` (a folder, or a hub id at `revision`) to the new folder `dest`.

    Linear layers, embedding and head are quantized by rounding to nearest: all to `bits`, with one
    scale for `group_size` weights (64, or what the mode has) in MLX's `mode`, or else as `recipe` says,
    one of RECIPES or a TOML file (see convert.recipe). With `bits` None and no recipe nothing is
    quantized, and a quantized source is dequantized. `dtype` casts the rest, scales included.

    With `calibrate` (True, or a text file) weights are not rounded to nearest, but so that blocks do to a
    text what the original's do; and unless there is a recipe, layers that matter more get more bits at
    the same size. `target_bpw` does so for that many bits per weight in all, instead of `bits`.

    `dest` appears when it is complete and was read back. A run that was killed leaves a hidden folder
    beside it, in which `resume` goes on, to the same bytes. `progress(done, total)` counts bytes.
    Memory stays at some rows of the largest tensor. Of a model on the hub a file is fetched when it is
    needed; with `keep` False it goes when it was converted, so that the disk holds one of them at most.
    `tokenizer` is a checkpoint to take tokenizer and chat template from: OLMo-core's own have none.
    With `card` the result is measured against the source on a `text` file, or on one that comes with this,
    and gets QUALITY.md; None means if it can be. `upload_to` names a repository on the hub to put it in.

    Raises OptionError for options that do not exist or go together; ConfigError, CheckpointError or
    HubError for a source that cannot be read or holds NaN; ConvertError for one that is quantized
    already, a recipe that does not fit it, and a destination that exists or cannot be written.
    """
    begin = time.perf_counter()
    how = _recipe(bits, group_size, mode, recipe)
    cast = None if dtype is None else dtype_named(dtype)
    if target_bpw is not None and (recipe is not None or bits is None or not 1 < target_bpw < 16):
        raise OptionError(f"target_bpw must be between 1 and 16, without a recipe, not {target_bpw}")
    if (calibrate or target_bpw is not None) and not keep:
        raise OptionError("calibration reads the original more than once: leave out keep=False (--no-keep)")
    if card and not keep:
        raise OptionError("a card needs the original again: give either card or keep=False (--no-keep)")
    if upload_to is not None:
        check_upload(upload_to)
    with new_folder(Path(dest), resume=resume) as folder:
        origin = Source.open(source, revision, None if keep else folder / _SHARDS)
        words = origin.folder if tokenizer is None else resolve(tokenizer, weights=False)
        work = _conversion(origin, how, cast, words, _Wishes(calibrate, target_bpw, recipe is not None))
        evaluation, no_card = _evaluation(work, words, text, card)
        work.write(folder, words, progress)
        names = (str(source), Path(dest).name)
        quality = None if evaluation is None else work.measure(folder, evaluation, names)
        work.describe(folder, upload_to or Path(dest).name, quality)
        shutil.rmtree(folder / _SHARDS, ignore_errors=True)
    if upload_to is not None:
        upload(Path(dest), upload_to)
    return Report(
        parameters=work.parameters,
        source_bytes=origin.nbytes,
        bytes=work.layout.nbytes,
        seconds=time.perf_counter() - begin,
        left_out=work.plan.left_out,
        quality=quality,
        no_card=no_card,
    )


class _Wishes(NamedTuple):
    """What was asked of calibration; `fixed` if a recipe says which layer has how many bits."""

    calibrate: bool | str | Path
    target_bpw: float | None
    fixed: bool


def _conversion(
    source: Source, recipe: Recipe, dtype: mx.Dtype | None, words: Path, wishes: _Wishes
) -> Conversion:
    """What is to be done, found out before the long work."""
    plan = recipe.plan(Olmo3(source.config))
    if source.config.quantization is not None and plan.layers:
        how = source.config.quantization.default
        raise ConvertError(
            f"{source.folder} is quantized already ({how.bits} bits, {how.mode}): quantizing again loses "
            f"more than it should: convert the original (or dequantize it: --dtype alone, bits=None)"
        )
    rounding = Conversion(source, plan, dtype)
    if not wishes.calibrate and wishes.target_bpw is None:
        return rounding
    if any(how.mode != "affine" for how in plan.layers.values()) or not plan.layers:
        raise OptionError("calibration is for affine quantization: leave out the mode, or calibrate")
    tokens = _calibration_tokens(source, words, wishes.calibrate)
    if wishes.fixed:
        return Conversion(source, plan, dtype, tokens)
    target = wishes.target_bpw or rounding.bits_per_weight
    some = tokens[: max(1, _SENSITIVITY_TOKENS // tokens.shape[1])]
    chosen = Conversion(source, Plan(choose(source, some, target)), dtype, tokens)
    if chosen.bits_per_weight > target + 1e-9:
        raise ConvertError(
            f"{target} bits per weight cannot be reached: the least for this model is "
            f"{chosen.bits_per_weight:.3f}"
        )
    return chosen


def _calibration_tokens(source: Source, words: Path, calibrate: bool | str | Path) -> mx.array:
    file = CALIBRATION_TEXT if isinstance(calibrate, bool) else Path(calibrate)
    length = min(_LENGTH, source.config.max_position_embeddings)
    tokens = text_tokens(read_text(file), Tokenizer.from_folder(words), length, _CALIBRATION_TOKENS // length)
    check_token_ids(tokens, source.config.vocab_size)
    return tokens


def _evaluation(
    work: Conversion, words: Path, text: str | Path | None, card: bool | None
) -> tuple[Evaluation | None, str]:
    """The text to measure on, or why there is none. Found out before the long work, as it may be told."""
    if card is False or (card is None and not work.plan.layers):
        return None, ""
    try:
        file = None if text is None else Path(text)
        config = work.source.config
        length = min(_LENGTH, config.max_position_embeddings)
        found = Evaluation.make(file, Tokenizer.from_folder(words), _TOKENS, length)
        check_token_ids(found.tokens, config.vocab_size)
    except Olmo3Error as error:
        if card or text is not None:
            raise
        return None, str(error)
    return found, ""


def _recipe(bits: int | None, group_size: int | None, mode: str, recipe: str | Path | None) -> Recipe:
    if recipe is not None:
        return recipe_named(recipe)
    return Recipe(None if bits is None else uniform(bits, group_size, mode))
