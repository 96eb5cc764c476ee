"""What is to be done, found out before the long work: which layer gets how many bits, on which texts."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import NamedTuple

import mlx.core as mx

from convert.calibration.sensitivity import choose, extremes
from convert.card.calibrated import CalibratedOn
from convert.conversion import Conversion
from convert.evaluation import CALIBRATION_NAME, CALIBRATION_TEXT, Evaluation, read_text, sha256, text_tokens
from convert.finite import check_all_finite
from convert.pipeline import Stage
from convert.recipe import Plan, Recipe
from convert.source import Source
from convert.writer.journal import identity
from olmo3_mlx.errors import ConvertError, Olmo3Error, OptionError
from olmo3_mlx.hub import resolve
from olmo3_mlx.model import Olmo3, check_token_ids
from olmo3_mlx.quantization import Quantization
from olmo3_mlx.tokenizer import Tokenizer

_CALIBRATION_TOKENS = 32768  # in sequences of _LENGTH, or what a text has
_LEAST_TOKENS = 8192  # that it must have
_SENSITIVITY_TOKENS = 1024  # of those, on which layers are weighed against each other
_TOKENS, _LENGTH = 2048, 512  # that a card is measured on, in sequences of so many


class Wishes(NamedTuple):
    """What was asked of calibration; `fixed` if a recipe says which layer has how many bits."""

    calibrate: bool | str | Path
    target_bpw: float | None
    fixed: bool

    def check(self, bits: int | EllipsisType | None, keep: bool) -> None:
        """Raise OptionError for wishes that cannot be, or not together."""
        target = self.target_bpw
        if target is not None and (self.fixed or bits is None or not 1 < target < 16):
            raise OptionError(f"target_bpw must be between 1 and 16, without a recipe, not {target}")
        if (self.calibrate or target is not None) and not keep:
            raise OptionError(
                "calibration reads the original more than once: leave out keep=False (--no-keep)"
            )


def planned(
    source: Source,
    recipe: Recipe,
    dtype: mx.Dtype | None,
    words: Path,
    *,
    wishes: Wishes,
    folder: Path,
    stage: Stage,
) -> Conversion:
    """What is to be done, found out before the long work, or what was begun in `folder` if it is that.
    `stage` is told what takes time.
    """
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
        raise OptionError(
            "calibration is for affine quantization: leave out mode (--mode), or calibrate (--calibrate)"
        )
    target = wishes.target_bpw or rounding.bits_per_weight
    if wishes.target_bpw is not None:
        _check_target(source, target, dtype)
    tokens, on = _calibration_text(source, words, wishes.calibrate)
    stage("reading the weights")
    check_all_finite(source, dtype)
    conversion = partial(Conversion, source, dtype=dtype, tokens=tokens, on=on)
    if wishes.fixed:
        return conversion(plan)
    begun = _begun(folder, conversion(plan, target=target))
    if begun is not None:
        return conversion(begun, target=target)
    some = tokens[: max(1, _SENSITIVITY_TOKENS // tokens.shape[1])]
    layers = choose(source, some, target, dtype=rounding.dtype, stage=stage)
    return conversion(_plan(source, layers), target=target)


def _check_target(source: Source, target: float, dtype: mx.Dtype | None) -> None:
    least, most = (Conversion(source, plan, dtype).bits_per_weight for plan in extremes(source))
    if not least <= target <= most:
        raise ConvertError(
            f"{target:g} bits per weight cannot be reached: this model can have {least:.3f} to {most:.3f}"
        )


def _begun(folder: Path, work: Conversion) -> Plan | None:
    """The plan of an unfinished conversion that is `work` but for its plan, chosen then."""
    found, asked = identity(folder), work.identity()
    if any(found.get(key) != asked[key] for key in asked.keys() - {"layers"}):
        return None
    try:
        return _plan(work.source, {path: Quantization(*how) for path, how in found["layers"].items()})
    except (KeyError, TypeError, AttributeError):
        return None


def _plan(source: Source, layers: Mapping[str, Quantization]) -> Plan:
    """What was chosen: all layers but those whose inputs no group size divides."""
    return Plan(layers, tuple(sorted(Olmo3(source.config).quantizable().keys() - layers.keys())))


def _calibration_text(
    source: Source, words: Path, calibrate: bool | str | Path
) -> tuple[mx.array, CalibratedOn]:
    """Tokens [N, L], and what a card says of the text that they are from."""
    file = CALIBRATION_TEXT if isinstance(calibrate, bool) else Path(calibrate)
    name = CALIBRATION_NAME if isinstance(calibrate, bool) else file.name
    text = read_text(file)
    length = min(_LENGTH, source.config.max_position_embeddings)
    tokens = text_tokens(
        text,
        Tokenizer.from_folder(words),
        length,
        _CALIBRATION_TOKENS // length,
        least=_LEAST_TOKENS // length,
    )
    check_token_ids(tokens, source.config.vocab_size)
    return tokens, CalibratedOn(name, sha256(text), tokens.size)


def words_of(name: str | Path) -> Path:
    """The folder of a checkpoint whose tokenizer and template are asked for. Raises TokenizerError if it has
    no tokenizer that can be read.
    """
    folder = resolve(name, weights=False)
    Tokenizer.from_folder(folder)
    return folder


def evaluation(
    work: Conversion, words: Path, text: str | Path | None, card: bool | None, *, keep: bool
) -> tuple[Evaluation | None, str]:
    """The text to measure on, or why there is none. Found out before the long work, as it may be told."""
    if card is False or (card is None and not work.plan.layers):
        return None, ""
    if not keep:
        return None, "the original goes as it is converted (--no-keep), measuring would fetch it again"
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
