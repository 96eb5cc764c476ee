"""Two checkpoints measured against each other: the figures, and what they were measured with."""

import os
import platform
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

import mlx.core as mx

from convert.calibration.text import CalibratedOn
from convert.card.advice import advice
from convert.card.command import CompareCommand
from convert.card.evaluation import EvaluationTexts
from convert.card.method import QuantizationMethod
from convert.card.quality import HISTOGRAM_EDGES, Quality
from convert.card.verdict import deciding, meaning, verdict
from olmo3_mlx import __version__

SCHEMA = 2  # of the figures; a change that breaks readers makes it 3
FLATTERED = "These figures flatter the result, as it was calibrated on a text that it is measured on"


@dataclass(frozen=True)
class Comparison:
    """A result measured against its original.

    quality                the figures
    texts                  the texts that both read
    command                the command that measures the same again; it names both checkpoints
    method                 how the result was quantized, if that is known
    original_quantization  how the original is quantized itself, in words; "" if it is not
    """

    quality: Quality
    texts: EvaluationTexts
    command: CompareCommand
    method: QuantizationMethod | None = None
    original_quantization: str = ""

    @property
    def original(self) -> str:
        """The original's name."""
        return self.command.a

    @property
    def result(self) -> str:
        """The result's name."""
        return self.command.b

    @property
    def verdict(self) -> str:
        """The quality in one word: "identical", "good", "fair" or "poor"."""
        return verdict(self.quality)

    @property
    def decided_by(self) -> str:
        """The kind of text that the verdict is about: the one on which the result is farthest off."""
        return deciding(self.quality)

    @property
    def said_of(self) -> str:
        """The same where it has to be said: "" if there is one kind, or nothing is off on any."""
        return self.decided_by if len(self.quality.kinds) > 1 and self.verdict != "identical" else ""

    @property
    def meaning(self) -> str:
        """The verdict's meaning for whoever uses the result, in half a sentence."""
        return meaning(self.verdict)

    @property
    def advice(self) -> tuple[str, ...]:
        """What to try for a better result, the most promising first, as options of `olmo3 convert`."""
        return advice(self.quality, self.method)

    @property
    def flattered(self) -> bool:
        """Whether the result was calibrated on a text that it was measured on."""
        seen = self.calibrated_on
        return seen is not None and any(seen.saw(text.label.sha256) for text in self.texts.texts)

    @property
    def calibrated_on(self) -> CalibratedOn | None:
        """The texts that the result was calibrated on, if that is known."""
        return None if self.method is None else self.method.calibrated_on

    def without_paths(self) -> "Comparison":
        """The same comparison with folders and files by their own names, as it may be published."""
        return replace(self, command=self.command.without_paths())

    def figures(self) -> dict[str, Any]:
        """Every figure, for programs, in JSON's types; pairs are [original, result]."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "decided_by": self.decided_by,
            "advice": list(self.advice),
            "original": self.original,
            "original_quantized": self.original_quantization or None,
            "result": self.result,
            "texts": [text.figures() for text in self.texts.texts],
            "calibration": None if self.calibrated_on is None else self.calibrated_on.figures(),
            "command": str(self.command),
            "versions": versions(),
            **asdict(self.quality),
            "sizes": [
                {**asdict(size), "bits_per_weight": size.bits_per_weight} for size in self.quality.sizes
            ],
            "histogram": {"edges": HISTOGRAM_EDGES, "counts": self.quality.histogram},
        }


def versions() -> dict[str, str]:
    """The programs and the machine that measured."""
    device = str(mx.default_device().type).rpartition(".")[2]
    # GPUs that have TF32 multiply float32 in it, unless MLX is told otherwise.
    tf32 = device == "gpu" and os.environ.get("MLX_ENABLE_TF32", "1") != "0"
    return {
        "olmo3-mlx": __version__,
        "mlx": metadata.version("mlx"),
        "device": device,
        "tf32": "possible" if tf32 else "off",
        "platform": f"{platform.system()} {platform.machine()}",
    }
