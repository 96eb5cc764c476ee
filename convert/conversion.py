"""One conversion: what of a source becomes what, and where; reading, converting, writing, describing."""

import hashlib
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from convert.calibration.resumable import calibrated
from convert.calibration.text import CalibratedOn
from convert.card.evaluation import Evaluation
from convert.card.measure import measure
from convert.card.model_card import Made, origin, source_name, write_model_card
from convert.card.page import remove_card, write_card
from convert.card.quality import Quality
from convert.card.verdict import Quantized
from convert.progress import Progress, Stage
from convert.quantized import rounded
from convert.reading.ahead import ahead
from convert.reading.source import Source
from convert.reading.stored import pieces
from convert.recipe import Plan
from convert.size import Size
from convert.writer.files import copy_files, small_files, write_config, write_index
from convert.writer.folder import check_room
from convert.writer.journal import OPTIONS, Journal
from convert.writer.layout import Layout, Spec, lay_out, parts
from convert.writer.output import Output
from olmo3_mlx import __version__
from olmo3_mlx.checkpoints.checkpoint import check_finite
from olmo3_mlx.errors import Olmo3Error
from olmo3_mlx.model import Olmo3
from olmo3_mlx.quantization import in_words
from olmo3_mlx.text.tokenizer import Tokenizer

_PROGRAM = f"olmo3-mlx {__version__} with mlx {version('mlx')}"


class Conversion:
    """Of `source` by `plan`, with `dtype` for what is not quantized; left out, it is the source's.

    Weights are rounded to nearest, or calibrated on `tokens` [N, L] if there are any, from the text `on`;
    `target` is how many bits a weight the plan was chosen for, if it was, `options` what a user called all
    that.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        dtype: mx.Dtype | None,
        tokens: mx.array | None = None,
        target: float | None = None,
        *,
        on: CalibratedOn | None = None,
        options: str = "",
    ) -> None:
        self.source, self.plan, self.dtype = source, plan, dtype or source.dtype
        self.tokens, self.target, self.on, self.options = tokens, target, on, options
        self.names = list(Olmo3(source.config).tensors())
        self.specs = {name: self._specs(name) for name in self.names}
        self.layout: Layout = lay_out(list(self.specs.values()))
        self.size = Size(source.parameters, self.layout.nbytes)

    @property
    def bits_per_weight(self) -> float:
        """Of the whole result, scales and unquantized tensors included."""
        return self.size.bits_per_weight

    def write(self, folder: Path, words: Path, progress: Progress, stage: Stage) -> None:
        """Fill the folder; tokenizer and template are those of the checkpoint in `words`. `progress` is told
        how many bytes are written, `stage` what comes next.
        """
        journal = Journal(folder, {**self.identity(), "words": small_files(self.source.folder, words)})
        journal.keep(self.specs)
        check_room(folder, self.layout, self.source.largest_shard())
        output = Output(folder, self.layout, journal)
        write_index(folder, self.layout, self.size.parameters)
        write_config(folder, self.source.data, self.source.config, self.plan, self.dtype)
        copy_files(self.source.folder, words, folder)
        done = sum(spec.nbytes for name in journal.done for spec in self.specs[name].values())
        stage("converting")
        for name, piece in self._pieces(folder, set(journal.done), stage):
            output.write(name, piece)
            done += sum(array.nbytes for array in piece.values())
            progress(done, self.layout.nbytes)
        self.source.check_unchanged()
        stage("reading back")
        output.finish()

    def measure(
        self, folder: Path, evaluation: Evaluation, command: list[str], made: Quantized, *, stage: Stage
    ) -> tuple[Quality | None, str]:
        """Measure what was written against the source, and write the card: `made` so, `command` does so
        again. Where either fails the result is whole all the same: then there is no card, and why.
        """
        quality = None
        try:
            quality = measure(
                self.source,
                Source.open(folder),
                evaluation.tokens,
                lambda done, total: stage(f"measuring, {done / total:.0%}"),
            )
            measured = evaluation.measured(
                command[2], command[3], shlex.join(command), made, in_words(self.source.quantized.values())
            )
            write_card(folder, quality, measured)
        except Olmo3Error as error:
            return quality, str(error)
        return quality, ""

    def describe(self, folder: Path, name: str, quality: Quality | None = None) -> None:
        """Write the model card; the model is called `name`. Without `quality` there is no quality card."""
        if quality is None:
            remove_card(folder)  # which an earlier run may have written before it was stopped
        base, license = origin(self.source.folder)
        layers = Olmo3(self.source.config).quantizable()
        made = Made(
            name=name,
            source=source_name(self.source.folder),
            quantized=in_words(self.source.quantized.values()),
            base=base,
            license=license,
            plan=self.plan,
            plain={p: self._dtype(f"{p}.weight") for p in layers if p not in self.plan.layers},
            dtype=str(self._dtype("model.norm.weight")).rpartition(".")[2],
            size=self.size,
            on=self.on,
            program=_PROGRAM,
            chats=_chats(folder),
        )
        write_model_card(folder, made, quality)

    def _pieces(
        self, folder: Path, done: set[str], stage: Stage
    ) -> Iterator[tuple[str, dict[str, mx.array]]]:
        """What each weight becomes, some rows at a time, less those that are `done`."""
        todo = [name for name in self.names if name not in done]
        if self.tokens is not None:
            todo = [name for name in todo if self.plan.of(name) is None]
        yield from ahead(self._converted(ahead(self._read(todo))))
        if self.tokens is not None:
            there = Source.open(folder)
            yield from calibrated(
                self.source, self.plan, self.tokens, self.dtype, done=done, there=there, stage=stage
            )

    def _read(self, names: list[str]) -> Iterator[tuple[str, mx.array]]:
        """Tensors by name, some rows at a time, in the dtype they will have."""
        for place, name in enumerate(names, start=1):
            for rows in pieces(self.source.tensors[name]):
                weight = rows.astype(self._dtype(name))
                check_finite({name: weight}, self.source.folder)
                yield name, weight
            self.source.release(name, names[place:])
            self.source.check_unchanged()

    def _converted(
        self, weights: Iterator[tuple[str, mx.array]]
    ) -> Iterator[tuple[str, dict[str, mx.array]]]:
        """What those rows become."""
        for name, weight in weights:
            made = rounded(name, weight, self.plan.of(name))
            mx.eval(*made.values())
            yield name, made

    def _specs(self, name: str) -> dict[str, Spec]:
        return parts(name, self.source.tensors[name].shape, self._dtype(name), self.plan.of(name))

    def _dtype(self, name: str) -> mx.Dtype:
        return self.dtype or self.source.tensors[name].dtype

    def identity(self) -> dict[str, Any]:
        """What tells it from another conversion, in JSON's types, but for tokenizer and template."""
        return {
            OPTIONS: self.options,
            "program": _PROGRAM,
            "device": mx.default_device().type.name,  # they do not round alike
            "source": self.source.identity(),
            "dtype": str(self.dtype),
            "calibration": _sha256(self.tokens),
            "target": self.target,
            "layers": {path: [how.bits, how.group_size, how.mode] for path, how in self.plan.layers.items()},
        }


def _chats(folder: Path) -> bool:
    """Whether there is a chat template, in any of its places, that can be read."""
    try:
        return Tokenizer.from_folder(folder).chat_template is not None
    except Olmo3Error:  # or no tokenizer: no fault of the conversion
        return False


def _sha256(tokens: mx.array | None) -> str | None:
    return None if tokens is None else hashlib.sha256(memoryview(tokens)).hexdigest()  # type: ignore[arg-type]
