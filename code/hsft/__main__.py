"""`python -m hsft`, for what starts Python itself: `torchrun --nproc_per_node 2 -m hsft train ...`."""

import sys

from hsft.cli import main

if __name__ == "__main__":
    sys.exit(main())
