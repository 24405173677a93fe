# make train   set everything up and run the main job on the embedded data set
# make test    set everything up and run all checks that need no GPU
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup train test lint types test-quick clean
help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh $(VENV)
	@touch $@

train: $(READY)
	@$(BIN)/arat-fast train --config digits --with-standard --autoattack

test: $(READY) lint types
	@$(BIN)/python -m pytest

# make lint    style only
lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .

# make types   mypy --strict on the installed package
types: $(READY)
	@scripts/typecheck.sh $(VENV)

# make test-quick  tests without the slow ones
test-quick: $(READY)
	@$(BIN)/python -m pytest -m "not slow and not gpu"

# make clean   remove the environment and caches, never runs/ or data/
clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
