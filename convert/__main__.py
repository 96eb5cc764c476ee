"""python -m convert: the same as `olmo3 convert`."""

import sys

from olmo3_mlx.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
