"""How far from the truth a healthy machine may be: measured here, bounded by theory where it was not.

Measured with MLX 0.32.4 on its CPU backend (x86-64); a GPU was not at hand. What a GPU adds is that it may
multiply float32 as TF32, which rounds factors to 11 bits (NVIDIA A100 white paper, 2020; on an M5 MLX does
the like), sums in another order, and has faster, rougher functions. Healthy machines are well within each
figure, and what is wrong is far beyond: a result of random numbers differs by its own size.
"""

from dataclasses import dataclass

import mlx.core as mx

TYPES = (mx.float32, mx.bfloat16)  # what checkpoints and MLX compute in; float16 takes the latter's kernels


@dataclass(frozen=True)
class Tolerance:
    """A bound for float32 on a CPU, float32 on a GPU, and bfloat16 on either."""

    cpu: float
    gpu: float
    bfloat16: float

    def of(self, dtype: mx.Dtype) -> float:
        """That for this type on the default device; float16's errors are below bfloat16's."""
        if dtype != mx.float32:
            return self.bfloat16
        return self.gpu if on_gpu() else self.cpu


# In units of the sum of the terms' absolute values. Measured 1.9e-7 and 0.0024; bfloat16 rounds a weight's
# product, its sum with the bias, and the result, each to 2 ** -9; TF32 two factors to 2 ** -11, or cuts
# them to 2 ** -10. Numbers at random are off by 0.03 or more.
PRODUCTS = Tolerance(cpu=2e-6, gpu=2**-9, bfloat16=3 * 2**-9)

# In units of the result's own root mean square, for large products of which sums are compared.
LARGE_PRODUCTS = Tolerance(cpu=1e-4, gpu=2**-6, bfloat16=2**-4)

# Of weighted means of values from a normal distribution. Measured 6.7e-7 and 0.0065, which is the rounding
# of weights and of the result; TF32 shifts scores by some 2 ** -11, which weights follow.
ATTENTION = Tolerance(cpu=1e-5, gpu=2**-7, bfloat16=2**-5)

# Relative. Measured 3.1e-7 and 0.0071: it rounds twice, each time by 2 ** -8 at most.
NORM = Tolerance(cpu=4e-6, gpu=1e-4, bfloat16=2**-6)

# Of numbers from a normal distribution, up to position 4,000, whose angle float32 knows to 2.4e-4. Measured
# 4.7e-4 and 0.018, the rounding of numbers up to 4.
ROPE = Tolerance(cpu=4e-3, gpu=2e-2, bfloat16=2**-4)

# Of the demo's logits: root mean square over a position's logits, in units of their standard deviation.
# Measured 0 between prefill chunks on the CPU, 2e-6 from float64; 0.0019 where the factors of all layers are
# rounded as TF32 does; 0.16 in bfloat16 (and up to 0.05 in three other checkpoints), 0.03 in float16.
LOGITS = Tolerance(cpu=1e-4, gpu=0.01, bfloat16=0.5)

# The same, of a model beside itself, in other passes or from other caches. Measured 0 on the CPU, in bfloat16
# 0.06, where kernels on a GPU may each be as far off as above: faults of one position are not seen in it.
AGREEMENT = Tolerance(cpu=1e-4, gpu=0.01, bfloat16=0.25)

# The same, mean over positions, of caches in 8 and 4 bits beside caches that are not quantized, demo.
# Measured 0.008 and 0.10 there, up to 0.010 and 0.09 in three other checkpoints.
QUANTIZED_CACHES = {8: 0.05, 4: 0.3}

# The error of the largest of many logits is some three times their root mean square (measured 2.7), and a
# lead is the difference of two: below so many tolerances it says nothing.
NEAR_TIE = 4


def on_gpu() -> bool:
    """Whether the default device is one."""
    return mx.default_device().type == mx.DeviceType.gpu
