"""How do I hold a conversation? python examples/chat.py [--model MODEL]

Each turn runs only its new tokens: the caches keep the rest.
"""

import argparse

from olmo3_mlx import Chat, load

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo", help="demo, a folder, or a hub id")
args = parser.parse_args()

chat = Chat(*load(args.model), temperature=0, max_tokens=100)
for question in ("My name is Ada.", "What is 20 + 22?", "What is my name?"):
    pieces = list(chat.send(question))
    print(f"> {question}\n{''.join(piece.text for piece in pieces)}")
    print(f"  (ran {pieces[-1].prompt_tokens} new tokens, the caches hold {chat.tokens})")
