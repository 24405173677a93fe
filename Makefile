# make train   set everything up and run the main job on the embedded data set
# make test    set everything up and run all checks that need no GPU
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup train test lint types test-plain test-interpreted compile-kernels test-quick test-oldest docs bench clean
help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt scripts/setup.sh scripts/ffcv.sh
	@scripts/setup.sh $(VENV)
	@touch $@

train: $(READY)
	@$(BIN)/arat-fast train --config digits --with-standard --autoattack

test: $(READY) lint types docs compile-kernels test-interpreted test-plain

# make lint              style only
lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .

# make types             mypy --strict on the installed package
types: $(READY)
	@scripts/typecheck.sh $(VENV)

# make test-plain        every test, kernels by their twins in plain PyTorch
test-plain: $(READY)
	@$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not gpu"

# make test-interpreted  the kernel tests again, the kernels themselves run by Triton's interpreter
test-interpreted: $(READY)
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not gpu" tests/kernels

# make compile-kernels   compile every kernel for eight GPUs without one: registers, spills, load widths
compile-kernels: $(READY)
	@mkdir -p build
	@$(BIN)/arat-fast bench kernels --compile-only --json build/kernels.json >build/kernels.txt 2>&1 \
	  || { cat build/kernels.txt; exit 1; }
	@tail -n 1 build/kernels.txt

# make test-quick        tests without the slow ones
test-quick: $(READY)
	@$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow and not gpu"

# make test-oldest       the kernel tests on Python 3.12, torch 2.11 and Triton 3.6, in .venv-oldest
test-oldest:
	@scripts/oldest.sh

# make docs              build the documentation into site/; fails where a link leads nowhere
docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# make bench             measure everything small against its baselines; ARGS=--commit-results keeps the result
bench: $(READY)
	@$(BIN)/python -m pytest bench -q -p no:xdist --benchmark-columns=median,iqr,rounds $(ARGS)

# make clean             remove the environment and caches, never runs/ or data/
clean:
	rm -rf $(VENV) build site .cache *.egg-info .pytest_cache .mypy_cache .ruff_cache
