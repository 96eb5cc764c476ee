"""python -m olmo3_mlx: the same as `olmo3`."""

import sys

from olmo3_mlx.cli import main

if __name__ == "__main__":
    sys.exit(main())
