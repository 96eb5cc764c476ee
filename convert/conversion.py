"""One conversion: what a source becomes, and the steps there, from reading to describing."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from convert.calibration.resumable import calibrated
from convert.calibration.text import CalibrationText
from convert.card.command import CompareCommand, own_name
from convert.card.comparison import Comparison
from convert.card.evaluation import EvaluationTexts
from convert.card.measure import measure
from convert.card.method import QuantizationMethod
from convert.card.model_card import ModelFacts, origin, source_name, write_model_card
from convert.card.quality_card import remove_card
from convert.progress import Count, Progress, Stage
from convert.quantized import rounded
from convert.reading.ahead import ahead
from convert.reading.source import Source
from convert.reading.stored import pieces
from convert.recipe import Plan
from convert.saved_recipe import in_toml, recipe_of
from convert.size import Size
from convert.target import OPTIONS
from convert.writer import journal as keys
from convert.writer.files import copied_files, copy_files, write_config, write_index
from convert.writer.folder import check_room
from convert.writer.journal import Journal
from convert.writer.layout import Layout, Spec, lay_out, part_specs
from convert.writer.output import Output
from olmo3_mlx import __version__
from olmo3_mlx.checkpoints.weights import check_finite
from olmo3_mlx.errors import Olmo3Error
from olmo3_mlx.model import Olmo3
from olmo3_mlx.quantization import in_words
from olmo3_mlx.text.tokenizer import Tokenizer

_PROGRAM = f"olmo3-mlx {__version__} with mlx {version('mlx')}"

_CHOOSING = (*OPTIONS, "recipe", "bits", "group_size", "mode")  # settings that say which layer gets what

Pieces = Iterator[tuple[str, dict[str, mx.array]]]  # a weight's name, and rows of the tensors that it becomes


@dataclass(frozen=True)
class Conversion:
    """A source and all that decides what it becomes.

    source            the checkpoint that is converted
    plan              the schemes of the layers that are quantized
    tokenizer_folder  the checkpoint whose tokenizer and template the result gets
    cast              the dtype of what is not quantized; None for the source's
    calibration       the texts that weights are calibrated on; None if they are rounded to nearest
    target            the bits per weight that the plan was chosen for, if it was
    settings          the options that were asked for, as an error tells them
    """

    source: Source
    plan: Plan
    tokenizer_folder: Path
    cast: mx.Dtype | None = None
    calibration: CalibrationText | None = None
    target: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> mx.Dtype | None:
        """The dtype of what is not quantized; None if each tensor keeps its own."""
        return self.cast or self.source.dtype

    @cached_property
    def specs(self) -> dict[str, dict[str, Spec]]:
        """The tensors that each weight becomes, by the weight's name, in the order of the result."""
        tensors = self.source.tensors
        return {
            name: part_specs(name, tensors[name].shape, self._dtype(name), self.plan.of(name))
            for name in Olmo3(self.source.config).tensors()
        }

    @cached_property
    def layout(self) -> Layout:
        """The place of each tensor in the result's files."""
        return lay_out(list(self.specs.values()))

    @property
    def size(self) -> Size:
        """The size of the whole result, scales and unquantized tensors included."""
        return Size(self.source.parameters, self.layout.nbytes)

    def ingredients(self) -> dict[str, Any]:
        """All that the bytes of the result depend on: see convert.writer.journal."""
        return {
            keys.SETTINGS: dict(self.settings),
            keys.PROGRAM: _PROGRAM,
            keys.DEVICE: mx.default_device().type.name,  # they do not round alike
            keys.SOURCE: self.source.fingerprint(),
            keys.DTYPE: str(self.dtype),
            keys.CALIBRATION: None if self.calibration is None else self.calibration.sha256,
            keys.TARGET: self.target,
            keys.LAYERS: {path: [s.bits, s.group_size, s.mode] for path, s in self.plan.layers.items()},
            keys.COPIED_FILES: copied_files(self.source.folder, self.tokenizer_folder),
        }

    def recipe(self) -> str:
        """The plan as a recipe's file."""
        chosen = [(name, self.settings[name]) for name in _CHOOSING if name in self.settings]
        asked = [f"{name}={own_name(value) if name == 'recipe' else value}" for name, value in chosen]
        facts = [
            f"Asked for: {', '.join(asked)}; in all {self.size.in_words}, "
            f"{self.size.bits_per_weight:.3f} bits per weight.",
            f"Written by {_PROGRAM}.",
        ]
        if self.calibration is not None:
            facts.append(f"Calibrated on {self.calibration.described.in_words}.")
        inputs = {path: width for path, (_, width) in Olmo3(self.source.config).quantizable().items()}
        return in_toml(recipe_of(self.plan, inputs), source_name(self.source.folder), facts)

    def check_room(self, folder: Path) -> None:
        """Raise ConvertError if the disk of `folder` has no place for what is still to be written."""
        check_room(folder, self.layout, self.source.largest_shard())

    def write(self, folder: Path, progress: Progress, stage: Stage) -> None:
        """Fill the folder. `stage` is told what comes next, `progress` how many bytes of it are done."""
        journal = Journal(folder, self.ingredients())
        journal.keep(self.specs)
        self.check_room(folder)
        if journal.done:
            stage("checking what is there")
        output = Output(folder, self.layout, journal, progress)
        write_index(folder, self.layout, self.size.parameters)
        write_config(folder, self.source.data, self.source.config, self.plan, self.specs)
        copy_files(self.source.folder, self.tokenizer_folder, folder)
        self._fill(folder, output, set(journal.done), progress, stage)
        self.source.check_unchanged()
        stage("reading back")
        output.finish(progress)

    def _fill(self, folder: Path, output: Output, done: set[str], progress: Progress, stage: Stage) -> None:
        """Write the tensors that each weight becomes, less those that are `done`: first those that are
        rounded or stay, then those that are calibrated.
        """
        plain = [n for n in self.specs if self.calibration is None or self.plan.of(n) is None]
        stage("converting")
        count = Count(self._bytes(plain), progress, self._bytes(done.intersection(plain)))
        for name, piece in ahead(self._rounded(ahead(self._read([n for n in plain if n not in done])))):
            output.write(name, piece)
            count(sum(array.nbytes for array in piece.values()))
        if self.calibration is None:
            return
        stage("calibrating")
        count = Count(self._bytes(self.specs.keys() - plain), progress)
        steps = calibrated(
            self.source,
            self.plan,
            self.calibration.tokens,
            self.dtype,
            done=done,
            result=Source.open(folder),
            stage=stage,
            passed=lambda names: count(self._bytes(names)),
        )
        for name, piece in steps:
            output.write(name, piece)

    def _bytes(self, names: Iterable[str]) -> int:
        """The bytes of all that these weights become."""
        return sum(spec.nbytes for name in names for spec in self.specs[name].values())

    def measure(
        self,
        folder: Path,
        texts: EvaluationTexts,
        command: CompareCommand,
        method: QuantizationMethod,
        *,
        progress: Progress,
    ) -> Comparison:
        """Measure what was written against the source on texts; `command` measures the same again."""
        quality = measure(self.source, Source.open(folder), texts.tokens, progress, kinds=texts.kinds)
        return Comparison(quality, texts, command, method, in_words(self.source.quantized.values()))

    def describe(self, folder: Path, name: str, comparison: Comparison | None = None) -> None:
        """Write the model card; the model is called `name`. Without a comparison there is no quality card."""
        if comparison is None:
            remove_card(folder)  # which an earlier run may have written before it was stopped
        base, relation, license = origin(self.source.folder, self.source.data)
        layers = Olmo3(self.source.config).quantizable()
        facts = ModelFacts(
            name=name,
            source=source_name(self.source.folder),
            source_quantization=in_words(self.source.quantized.values()),
            base=base,
            relation=relation,
            license=license,
            plan=self.plan,
            plain={p: self._dtype(f"{p}.weight") for p in layers if p not in self.plan.layers},
            dtype=str(self._dtype("model.norm.weight")).rpartition(".")[2],
            size=self.size,
            calibrated_on=None if self.calibration is None else self.calibration.described,
            program=_PROGRAM,
            chats=_chats(folder),
        )
        write_model_card(folder, facts, comparison)

    def _read(self, names: list[str]) -> Iterator[tuple[str, mx.array]]:
        """Read weights by name, some rows at a time, in the dtype that they will have."""
        for place, name in enumerate(names, start=1):
            for rows in pieces(self.source.tensors[name]):
                weight = rows.astype(self._dtype(name))
                check_finite({name: weight}, self.source.folder)
                yield name, weight
            self.source.release(name, names[place:])
            self.source.check_unchanged()

    def _rounded(self, weights: Iterator[tuple[str, mx.array]]) -> Pieces:
        """Round those rows, as far as the plan quantizes them."""
        for name, weight in weights:
            tensors = rounded(name, weight, self.plan.of(name))
            mx.eval(*tensors.values())
            yield name, tensors

    def _dtype(self, name: str) -> mx.Dtype:
        return self.dtype or self.source.tensors[name].dtype


def _chats(folder: Path) -> bool:
    """Whether there is a chat template, in any of its places, that renders."""
    try:
        Tokenizer.from_folder(folder).check_chat_template()
    except Olmo3Error:  # or no tokenizer: no fault of the conversion
        return False
    return True
