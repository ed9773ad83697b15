"""`python -m higgs_ds <verb>`."""

import sys

from .distributed.launch_env import grow_segments

grow_segments()

from .process import end_process  # noqa: E402
from .tools.cli import main  # noqa: E402 - torch comes with it

end_process(main(sys.argv[1:]))
