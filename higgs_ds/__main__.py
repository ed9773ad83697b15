"""`python -m higgs_ds <verb>`."""

import sys

from .cli import main
from .process import end_process

end_process(main(sys.argv[1:]))
