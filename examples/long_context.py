"""What do the caches take as a text grows? python examples/long_context.py [--model MODEL]

Sliding-window layers stop growing once their window is full; full layers do not.
"""

import argparse

import mlx.core as mx

from olmo3_mlx import load
from olmo3_mlx.config import FULL

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo", help="demo, a folder, or a hub id")
parser.add_argument("--tokens", type=int, default=1024, help="tokens to feed")
args = parser.parse_args()

model, tokenizer = load(args.model)
text = tokenizer.encode("The sea was calm, the sun was high, and nobody spoke. ")
ids = (text * (args.tokens // len(text) + 1))[: args.tokens]
caches = model.make_caches(rewind=0)
print(f"window: {model.config.sliding_window} tokens")
for start in range(0, len(ids), 128):
    chunk = mx.array([ids[start : start + 128]])
    mx.eval(model(chunk, caches, logits_to_keep=1))
    full = sum(cache.nbytes for cache in caches if cache.layer_type == FULL)
    sliding = sum(cache.nbytes for cache in caches) - full
    print(f"{caches[0].offset:6} tokens: sliding {sliding / 1e6:7.2f} MB, full {full / 1e6:7.2f} MB")
