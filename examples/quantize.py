"""What does quantizing do to size and answer? python examples/quantize.py [--model MODEL] [PROMPT]"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx

from convert import convert
from olmo3_mlx import generate, load
from olmo3_mlx.checkpoints.checkpoint import Checkpoint
from olmo3_mlx.checkpoints.weights import read_weights

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo", help="demo, a folder, or a hub id")
parser.add_argument("prompt", nargs="?", default="What is 17 + 25?")
args = parser.parse_args()

with tempfile.TemporaryDirectory() as temporary:
    source, plain = Checkpoint.open(args.model), Path(temporary) / "plain"
    shutil.copytree(source.folder, plain, ignore=shutil.ignore_patterns("*.safetensors*"))
    quantization, tensors = source.config.quantization, read_weights(source.weight_files)
    for path in [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]:
        layer = quantization.of(path)  # the demo comes in 4 bits: back to what can be converted
        packed = (tensors.pop(f"{path}.{part}", None) for part in ("weight", "scales", "biases"))
        tensors[f"{path}.weight"] = mx.dequantize(*packed, layer.group_size, layer.bits, mode=layer.mode)
    mx.save_safetensors(str(plain / "model.safetensors"), tensors)
    config = json.loads((plain / "config.json").read_text())
    kept = {key: value for key, value in config.items() if not key.startswith("quantization")}
    (plain / "config.json").write_text(json.dumps(kept))

    for bits in (None, 8, 4):
        report = convert(plain, Path(temporary) / str(bits), bits=bits)
        answer = generate(*load(Path(temporary) / str(bits)), args.prompt, temperature=0, max_tokens=50)
        print(f"{report.bits_per_weight:6.2f} bits per weight, {report.bytes / 1e6:9.2f} MB: {answer.text}")
