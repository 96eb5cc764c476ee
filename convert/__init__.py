"""Checkpoints to MLX form, a few rows at a time: read, quantize, write, read back; and measure the loss.

from convert import compare, convert
print(convert("allenai/Olmo-3-7B-Instruct", "olmo3-7b-4bit", bits=4).bits_per_weight)
print(compare("allenai/Olmo-3-7B-Instruct", "olmo3-7b-4bit").verdict)
"""

from convert.card.comparison import Comparison
from convert.comparing import compare
from convert.converting import Report, convert
from convert.options import ConvertKeywords, ConvertOptions

__all__ = ["Comparison", "ConvertKeywords", "ConvertOptions", "Report", "compare", "convert"]
