# make demo        an experiment on data that comes with the package, and its report
# make test        the fast tests, compiled quickly  make test-all    all of them
#                  (XLA_FLAGS= make test compiles as users' programs are compiled, which takes twice the time)
# make lint        style, types, import directions   make bench       benchmarks beside torch, diffusers and TRL (an environment of its own)
# make aot         compile the paper's scale for pods that are not there (an environment of its own: over 1 GB)
# make clean       remove environments and caches; runs/ stays
#
# The environment .venv is made by the first call and reused; PYTHON=/path/to/python chooses the interpreter (3.11 or newer).

VENV := .venv
BIN := $(VENV)/bin
AOT_VENV := .venv-aot
BENCH_VENV := .venv-bench
BENCHMARKS := $(filter-out benchmarks/harness.py benchmarks/aot_gpu.py,$(wildcard benchmarks/*.py))
ARGS :=
TOPOLOGIES := v5e:16x16 v5p:4x4x4 v6e:8x8 h100:1x8

find_python = for p in "$(PYTHON)" python3.13 python3.12 python3.11 python3; do \
    [ -n "$$p" ] && "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; \
  done
make_venv = python="$$($(find_python))"; \
  [ -n "$$python" ] || { echo "make: no Python 3.11 or newer found; give one as PYTHON=/path/to/python" >&2; exit 2; }; \
  [ -x $(1)/bin/python ] || "$$python" -m venv $(1)

.PHONY: help demo test test-all lint bench aot clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^The environment/,$$d'

$(VENV)/.installed: pyproject.toml
	@$(call make_venv,$(VENV))
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml
	@$(call make_venv,$(VENV))
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(BENCH_VENV)/.installed: pyproject.toml
	@$(call make_venv,$(BENCH_VENV))
	$(BENCH_VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[tpu]' torch==2.13.0 diffusers trl
	@touch $@

$(AOT_VENV)/.installed: pyproject.toml
	@$(call make_venv,$(AOT_VENV))
	$(AOT_VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[tpu,aot-gpu]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/janax run bdia $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" $(ARGS)

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	PYTHONPATH=.ci/typing $(BIN)/lint-imports

bench: $(BENCH_VENV)/.installed
	@for script in $(BENCHMARKS); do echo "$$script"; $(BENCH_VENV)/bin/python "$$script" $(ARGS) || exit 1; done

aot: $(AOT_VENV)/.installed
	$(AOT_VENV)/bin/janax compile bdia --topology $(TOPOLOGIES) $(ARGS)

clean:
	rm -rf $(VENV) $(AOT_VENV) $(BENCH_VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
