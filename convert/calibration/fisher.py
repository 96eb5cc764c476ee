"""What errors within the model cost at its end: the Fisher information of hidden states and of outputs of
layers, from the gradients of convert.calibration.gradients on a few sequences.
"""

from math import prod
from tempfile import TemporaryFile, gettempdir
from weakref import finalize

import mlx.core as mx
import numpy as np

from convert.calibration.cholesky import with_ridge
from convert.calibration.gradients import back, back_by_layer, last_gradients, states_between, that_fit
from convert.reading.layers import DOWN, OUT, Layers, States, size_before_norm, split
from convert.reading.source import Source

_NORMED = (OUT, DOWN)  # a norm follows these layers' outputs
_TOKENS = 4096  # looked at, at most
_RIDGE = 0.1  # of the mean diagonal, added to it: few draws say little about some directions


class Fisher:
    """The Fisher information of a model on the first sequences of a text, as many as memory allows.

    Gradients by the states between blocks are found at the first call, in one pass and one back. They lie in
    a temporary file, in bfloat16, as they are more than all that is needed of a block: 1 GB for a 7B.
    """

    def __init__(self, source: Source, tokens: mx.array) -> None:
        """`tokens` [N, L] are the text."""
        self._layers, self._eps = Layers(source), source.config.rms_norm_eps
        self._text = that_fit(self._layers, tokens, _TOKENS // tokens.shape[1])
        self._shape = (*self._text.shape, source.config.hidden_size)
        self._first = self._layers.count + 1  # the gradients of this place and of later ones are in the file
        self._file = TemporaryFile()  # noqa: SIM115  (it is closed with this object)
        finalize(self, self._file.close)

    def embedding(self) -> mx.array:
        """That of the hidden states that go into the model, summed over tokens, with a ridge: [n, n]."""
        flat = mx.concatenate(self._at(0), axis=1)[0]
        hessian = flat.T @ flat
        return with_ridge(hessian, _RIDGE * float(mx.diag(hessian).mean().item()))  # type: ignore[arg-type]

    def outputs(self, index: int, states: States, names: tuple[str, ...]) -> dict[str, mx.array]:
        """That of the outputs [m] of layers of block `index`, by their names, summed over tokens: [m, m].
        `states` are the original's on the text, as they go into the block, of all its sequences.

        A layer that a norm follows counts as if its outputs had the size 1.
        """
        block, found = self._layers.block(index), {name: mx.array(0.0) for name in names}
        for state, gradient in zip(states, self._at(index + 1), strict=False):
            _, layers = back_by_layer(block, state, gradient)
            for name in names:
                slope = layers[name].gradient
                if name in _NORMED:
                    slope = slope * size_before_norm(layers[name].outputs, self._eps)
                found[name] = found[name] + slope.T @ slope
            mx.eval(found)
        return found

    def _at(self, place: int) -> States:
        """The gradients by the states before block `place`."""
        if place < self._first:
            self._find(place)
        size = 2 * prod(self._shape)
        self._file.seek(place * size)
        kept = mx.array(np.frombuffer(self._file.read(size), np.uint16))
        return split(kept.view(mx.bfloat16).reshape(self._shape).astype(mx.float32))

    def _find(self, first: int) -> None:
        """Go through the model, and back to the states before block `first`."""
        layers = self._layers
        states = states_between(layers, self._text)
        gradients = last_gradients(layers, states.pop())
        self._keep(layers.count, gradients)
        for index in reversed(range(first, layers.count)):
            gradients = back(layers.block(index), states.pop(), gradients)
            self._keep(index, gradients)
        self._first = first

    def _keep(self, place: int, gradients: States) -> None:
        kept = np.array(mx.concatenate(gradients).astype(mx.bfloat16).view(mx.uint16))
        try:
            self._file.seek(place * kept.nbytes)
            self._file.write(kept.tobytes())
            self._file.flush()
        except OSError as error:
            where = f"{error.strerror} in the temporary folder {gettempdir()} (TMPDIR names another)"
            raise OSError(error.errno, where) from None
