# make setup, lint, test, quickstart, docs: the five things that a contributor does.
SHELL := bash
RUN := export HIGGS_DS_DEV=1 && source launch/setup.sh &&
.PHONY: setup lint test quickstart docs

setup:  ## the environment: requirements.txt and requirements-dev.txt
	@$(RUN) true

lint:  ## style, types, import directions
	@$(RUN) ruff check . && ruff format --check . && mypy && lint-imports

test:  ## every test, on two processes
	@bash launch/test.sh

quickstart:  ## a small model learns to speak real recordings on this CPU
	@bash launch/quickstart.sh

docs:  ## docs/flags.md from the options
	@$(RUN) python -m tests.test_docs
