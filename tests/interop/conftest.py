"""The second environment as a fixture: `transformers_side(verb, **request)`."""

import json
import os
import subprocess

import pytest

from tests.interop.environment import HERE, Unreachable, interpreter


@pytest.fixture(scope="session")
def transformers_side(tmp_path_factory):
    """Calls a function of transformers_side.py in the second environment; skips where that cannot be made."""
    try:
        python = interpreter()
    except Unreachable as reason:
        pytest.skip(str(reason))
    folder = tmp_path_factory.mktemp("requests")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env.pop("PYTHONPATH", None)

    def call(verb: str, **request):
        file = folder / f"{verb}.json"
        file.write_text(json.dumps(request, default=str))
        command = [str(python), str(HERE / "transformers_side.py"), verb, str(file)]
        done = subprocess.run(command, text=True, capture_output=True, env=env, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return call
