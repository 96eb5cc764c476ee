"""The original in memory, to sample from: in its own precision, or rounded if that does not fit."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from convert.progress import Count, Progress
from convert.quantized import rounded
from convert.reading.source import Source
from convert.reading.stored import pieces
from convert.size import in_words
from olmo3_mlx.config import Olmo3Config
from olmo3_mlx.errors import MemoryFitError
from olmo3_mlx.memory.machine import machine_bytes
from olmo3_mlx.memory.sizes import cache_bytes
from olmo3_mlx.memory.working_space import working_bytes
from olmo3_mlx.model import Olmo3
from olmo3_mlx.quantization import Quantization

_GROUP_SIZE = 64
_FORMS = (None, 8, 4)  # bits, the first that fits


@dataclass(frozen=True)
class Form:
    """The form in which the original is held: its dtype; the bits that it is rounded to, None if it is not;
    and how many rows are drawn at a time.
    """

    dtype: mx.Dtype
    bits: int | None
    rows: int

    @property
    def in_words(self) -> str:
        """Behind "the original"; empty for the original itself."""
        return "" if self.bits is None else f" rounded to {self.bits} bits"


def form_that_fits(source: Source, rows: int, length: int) -> Form:
    """The form in which this machine can hold the model while up to `rows` rows of `length` tokens are drawn.
    It is the most exact one that fits with one row at least.

    Raises MemoryFitError if none does.
    """
    dtype, config, available = _dtype(source), source.config, machine_bytes()
    row = cache_bytes(config, length, itemsize=dtype.size)
    row += working_bytes(config, 1, length, itemsize=dtype.size)
    for bits in _FORMS:
        weights = sum(array.nbytes for array in _unread(config, dtype, bits).tensors().values())
        fitting = (available - weights) // row
        if fitting >= 1:
            batches = -(-rows // min(rows, fitting))
            return Form(dtype, bits, -(-rows // batches))
    raise MemoryFitError(
        f"sampling from this model takes {in_words(weights + row)} even at {bits} bits, this machine has "
        f"{in_words(available)}: calibrate on texts, or set OLMO3_MEMORY if it has more",
        needed=weights + row,
        available=available,
    )


def read_model(source: Source, form: Form, progress: Progress | None = None) -> Olmo3:
    """The model in that form; `progress` counts weights. Raises CheckpointError."""
    model, count = _unread(source.config, form.dtype, form.bits), Count(source.parameters, progress)
    for name, tensor in source.tensors.items():
        scheme = _scheme(form.bits, tensor.shape)
        parts: dict[str, list[mx.array]] = {}
        for rows in pieces(tensor):
            for part, array in rounded(name, rows.astype(form.dtype), scheme).items():
                mx.eval(array)
                parts.setdefault(part, []).append(array)
            count(rows.size)
        whole = {part: mx.concatenate(arrays) for part, arrays in parts.items()}
        del parts
        mx.eval(whole)
        model.load_weights(list(whole.items()), strict=False)
    source.check_unchanged()
    return model


def _unread(config: Olmo3Config, dtype: mx.Dtype, bits: int | None) -> Olmo3:
    """The model with arrays that are not evaluated: they have a size and take no memory."""
    model = Olmo3(config)
    model.set_dtype(dtype)
    if bits is not None:
        fitting = {path for path, shape in model.quantizable().items() if _scheme(bits, shape) is not None}
        nn.quantize(model, group_size=_GROUP_SIZE, bits=bits, class_predicate=lambda path, _: path in fitting)
    return model


def _scheme(bits: int | None, shape: tuple[int, ...]) -> Quantization | None:
    divided = len(shape) == 2 and shape[1] % _GROUP_SIZE == 0
    return Quantization(bits, _GROUP_SIZE) if bits is not None and divided else None


def _dtype(source: Source) -> mx.Dtype:
    """What the model computes in: MLX's CPU backend is fastest in float32, above all for many rows."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return mx.float32
    return source.dtype or source.tensors["model.norm.weight"].dtype
