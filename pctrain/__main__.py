"""`python -m pctrain` is the console command `pctrain`, so that `torchrun ... -m pctrain rl ...` works.

The guard is needed: torch's checkpoint writer spawns worker processes, and each of them imports this module again.
"""

import sys

from pctrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
