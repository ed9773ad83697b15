"""`python -m higgs_ds <verb>`."""

import sys

from .cli import main

sys.exit(main(sys.argv[1:]))
