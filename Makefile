# The environment is made once, in .venv; VENV=/path/to/one reuses another.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: serve test test-slow check chaos soak install clean

serve: $(STAMP)
	@exec $(BIN)/kvferry serve $(ARGS)

# Two processes fill two cores: threads of their own would only fight.
test: MARK = not slow
test-slow: MARK = slow
test test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -m "$(MARK)" $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

chaos: $(STAMP)
	$(BIN)/python -m tests.chaos $(ARGS)

soak: $(STAMP)
	$(BIN)/python -m tests.chaos.soak $(ARGS)

install: $(STAMP)

$(STAMP): pyproject.toml
	@echo 'Installing torch and the rest into $(VENV): this takes some minutes.'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
