"""What is to be done, found out before the long work: which layer gets how many bits, on which texts."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import NamedTuple

import mlx.core as mx

from convert.calibration.memory import check_memory
from convert.calibration.sensitivity import choose, extremes
from convert.calibration.text import CalibratedOn
from convert.card.evaluation import Evaluation
from convert.conversion import Conversion
from convert.progress import Stage
from convert.reading.finite import check_all_finite
from convert.reading.source import Source
from convert.reading.texts import CALIBRATION_NAME, CALIBRATION_TEXT, read_text, sha256, text_tokens
from convert.recipe import Plan, Recipe
from convert.writer.files import small_files
from convert.writer.journal import Identity, check_same, identity
from olmo3_mlx.checkpoints.hub import resolve
from olmo3_mlx.errors import ConvertError, Olmo3Error, OptionError
from olmo3_mlx.model import Olmo3, check_token_ids
from olmo3_mlx.quantization import Quantization
from olmo3_mlx.text.tokenizer import Tokenizer

_CALIBRATION_TOKENS = 32768  # in sequences of _LENGTH, or what a text has
_LEAST_TOKENS = 8192  # that it must have
_SENSITIVITY_TOKENS = 1024  # of those, on which layers are weighed against each other
_TOKENS, _LENGTH = 2048, 512  # that a card is measured on, in sequences of so many


class Wishes(NamedTuple):
    """What was asked of calibration; `fixed` if a recipe says which layer has how many bits, `options` are
    all that were given, in words.
    """

    calibrate: bool | str | Path
    target_bpw: float | None
    fixed: bool
    options: str

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
    make = partial(Conversion, source, dtype=dtype, options=wishes.options)
    rounding = make(plan)
    if not wishes.calibrate and wishes.target_bpw is None:
        return rounding
    if any(how.mode != "affine" for how in plan.layers.values()) or not plan.layers:
        raise OptionError(
            "calibration is for affine quantization: leave out mode (--mode), or calibrate (--calibrate)"
        )
    target = None if wishes.fixed else wishes.target_bpw or rounding.bits_per_weight
    if wishes.target_bpw is not None:
        _check_target(source, wishes.target_bpw, dtype)
    tokens, on = _calibration_text(source, words, wishes.calibrate)
    check_memory(source.config, tokens.size)
    make = partial(make, tokens=tokens, target=target, on=on)
    work = make(plan)
    begun = _begun(folder, source, {**work.identity(), "words": small_files(source.folder, words)})
    stage("reading the weights")
    check_all_finite(source, dtype)
    if target is None:
        return work
    if begun is not None:
        return make(begun)
    some = tokens[: max(1, _SENSITIVITY_TOKENS // tokens.shape[1])]
    return make(_plan(source, choose(source, some, target, dtype=rounding.dtype, stage=stage)))


def _check_target(source: Source, target: float, dtype: mx.Dtype | None) -> None:
    least, most = (Conversion(source, plan, dtype).bits_per_weight for plan in extremes(source))
    if not least <= target <= most:
        raise ConvertError(
            f"{target:g} bits per weight cannot be reached: this model can have {least:.3f} to {most:.3f}"
        )


def _begun(folder: Path, source: Source, asked: Identity) -> Plan | None:
    """The plan that was chosen for what was begun in `folder`, if anything was. Raises ConvertError if that
    is another conversion, whatever its plan: before one is chosen, which is long.
    """
    found = identity(folder)
    if not found:
        return None
    check_same(folder, found, {**asked, "layers": found.get("layers")})
    try:
        return _plan(source, {path: Quantization(*how) for path, how in found["layers"].items()})
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
