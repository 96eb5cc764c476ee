"""Decisions before the long work: which layer gets which scheme, and on which texts.

Whatever can be found out to be impossible is found out here.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from convert.calibration.allocation import extremes
from convert.calibration.memory import check_memory
from convert.calibration.sensitivity import choose
from convert.calibration_texts import texts_to_calibrate_on
from convert.card.evaluation import EvaluationTexts, texts_to_measure_on
from convert.conversion import Conversion
from convert.options import ConvertOptions, check_affine
from convert.progress import Notice, Progress, Stage
from convert.reading.finite import check_all_finite
from convert.reading.source import Source
from convert.reading.stored import reading
from convert.recipe import Plan
from convert.writer.journal import LAYERS, Journal
from olmo3_mlx.checkpoints.names import resolve
from olmo3_mlx.errors import ConvertError, NoTemplateError, Olmo3Error, Setting, TokenizerError
from olmo3_mlx.model import Olmo3
from olmo3_mlx.quantization import Quantization
from olmo3_mlx.text.tokenizer import Tokenizer
from olmo3_mlx.token_ids import check_token_ids

_TOKENS, _LENGTH = 2048, 512  # of each text that a card is measured on, in sequences of so many


def prepare(source: Source, options: ConvertOptions) -> Conversion:
    """The conversion of a source by rounding, which `calibrating` goes on from.

    Raises ConvertError for a source that is quantized already and a recipe that does not fit it,
    TokenizerError.
    """
    tokenizer_folder = _tokenizer_folder(source, options)
    plan = options.schemes.plan(Olmo3(source.config))
    if source.config.quantization is not None and plan.layers:
        scheme = source.config.quantization.default
        raise ConvertError(
            f"{source.folder} is quantized already ({scheme.bits} bits, {scheme.mode}): quantizing again "
            f"loses more than it should: convert the original (or dequantize it: ",
            Setting("bits", None),
            ")",
        )
    return Conversion(source, plan, tokenizer_folder, options.cast, settings=options.settings)


def _tokenizer_folder(source: Source, options: ConvertOptions) -> Path:
    """The folder of the checkpoint whose tokenizer and template are taken: the source, or the one asked for,
    which must have a tokenizer.
    """
    if options.tokenizer is None:
        return source.folder
    folder = resolve(options.tokenizer, weights=False)
    Tokenizer.from_folder(folder)
    return folder


def check_tokenizer(conversion: Conversion, notice: Notice) -> bool:
    """Whether the result's tokenizer and template can be read. If not, `notice` is told that nobody can talk
    to it: no fault of the conversion, as checkpoints from a training run have none.
    """
    folder = conversion.tokenizer_folder
    reason = "the result has no tokenizer.json, as its source has none"
    if (folder / "tokenizer.json").is_file():
        try:
            with suppress(NoTemplateError):  # base models have none
                Tokenizer.from_folder(folder).check_chat_template()
        except Olmo3Error as error:
            reason = f"the result's tokenizer cannot be used ({error})"
        else:
            return True
    end = (Setting("tokenizer", "MODEL"), " says from where)")
    notice(
        TokenizerError(f"{reason}: it cannot chat or generate until the model's is copied into it (", *end)
    )
    return False


def calibrating(
    rounding: Conversion,
    options: ConvertOptions,
    folder: Path,
    notice: Notice,
    *,
    stage: Stage,
    progress: Progress,
) -> Conversion:
    """The same conversion; by calibration, if `options` ask for that. Then its plan is the recipe's, or
    chosen for the target or this size, which takes long. It is begun in `folder`'s journal first; where it
    was begun there before, its plan is taken, or what was measured to choose one.

    `stage` and `progress` are told what takes time, `notice` if the model cannot write text to calibrate on
    that nobody asked for. Raises ConvertError for a target that the source cannot reach, and for another
    conversion that was begun in `folder`; OptionError and PromptError for texts to calibrate on;
    MemoryFitError; CheckpointError for weights that are not finite.
    """
    if not options.calibrates:
        return rounding
    if options.target is None:  # the size is known before
        rounding.check_room(folder)
    source = rounding.source
    check_affine(rounding.plan.layers.values())
    if options.target is not None:
        options.target.check_reach(*(replace(rounding, plan=plan).size for plan in extremes(source)))
    with reading(rounding.tokenizer_folder):
        texts = texts_to_calibrate_on(rounding, options, notice)
    check_memory(source.config, texts.planned.tokens.size)
    target = _bits_per_weight(rounding, options)
    conversion = replace(rounding, calibration=texts.planned, target=target)
    ingredients = conversion.ingredients()
    journal = Journal(folder, ingredients if target is None else {**ingredients, LAYERS: None})
    stage("reading the weights")
    check_all_finite(source, options.cast, progress)
    text = texts.read(journal, stage, progress)
    conversion = replace(conversion, calibration=text)
    if target is None:
        return conversion
    plan = _begun(conversion, journal)
    if plan is None:
        layers = choose(
            source,
            text.tokens,
            target,
            kinds=text.kinds,
            dtype=conversion.dtype,
            measured=_measured(conversion, journal),
            keep=journal.record_costs,
            stage=stage,
            progress=progress,
        )
        plan = _plan(source, layers)
    return replace(conversion, plan=plan)


def _bits_per_weight(rounding: Conversion, options: ConvertOptions) -> float | None:
    """The bits per weight that bits are chosen for: the target's, or those of rounding; None if a recipe says
    which layer has how many.
    """
    if options.recipe is not None:
        return None
    size = rounding.size
    return size.bits_per_weight if options.target is None else options.target.bits_per_weight(size.parameters)


def _begun(conversion: Conversion, journal: Journal) -> Plan | None:
    """The plan that an earlier run chose, if one did."""
    try:
        chosen = journal.ingredients[LAYERS].items()
        layers = {path: Quantization(*scheme) for path, scheme in chosen}
    except (KeyError, TypeError, AttributeError):
        return None
    return _plan(conversion.source, layers)


def _measured(conversion: Conversion, journal: Journal) -> Mapping[str, float] | None:
    """What an earlier run measured to choose a plan, if it came to that."""
    measured, layers = journal.costs, Olmo3(conversion.source.config).quantizable()
    return measured if measured is not None and measured.keys() == layers.keys() else None


def _plan(source: Source, layers: Mapping[str, Quantization]) -> Plan:
    """The plan of schemes that were chosen: for all layers but those whose inputs no group size divides."""
    return Plan(layers, tuple(sorted(Olmo3(source.config).quantizable().keys() - layers.keys())))


def evaluation_texts(
    conversion: Conversion, options: ConvertOptions
) -> tuple[EvaluationTexts | None, Olmo3Error | None]:
    """The texts to measure the result on; None if no card is asked for, or if there can be none: then the
    error says why.

    Raises that error if a card is asked for.
    """
    if options.card is False or (options.card is None and not conversion.plan.layers):
        return None, None
    if not options.keep:
        return None, ConvertError(
            "the original goes as it is converted (",
            Setting("keep", False),
            "), measuring would fetch it again",
        )
    try:
        config = conversion.source.config
        tokenizer = Tokenizer.from_folder(conversion.tokenizer_folder)
        found = texts_to_measure_on(options.text_files, tokenizer)
        texts = EvaluationTexts.cut(found, tokenizer, _TOKENS, min(_LENGTH, config.max_position_embeddings))
        check_token_ids(texts.tokens, config.vocab_size)
    except Olmo3Error as error:
        if options.card or options.text is not None:
            raise
        return None, error
    return texts, None
