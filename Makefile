# One command does everything: `make run`. The others: `make help`.
# Extra arguments: make run ARGS="--env test", make test ARGS="-k spec".

# The first interpreter that is new enough; `make run PYTHON=/path/to/python` picks another.
NEEDED := 3.11
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && exit; \
	done; echo python3)
BIN := .venv/bin
ARGS ?=

# Nothing is sent anywhere, and BentoML keeps its store inside the project.
export DO_NOT_TRACK := 1
export BENTOML_DO_NOT_TRACK := True
export KEDRO_DISABLE_TELEMETRY := 1
export GX_ANALYTICS_ENABLED := false
export BENTOML_HOME := $(CURDIR)/data/06_models/bentoml
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup run test check serve monitor-ui viz feast airflow lock audit clean distclean

help:
	@echo "make run    set up, then raw log → validated → trained → released → watched (kedro run)"
	@echo "make serve  set up, then serve the champion over HTTP"
	@echo "make test   set up, then run the tests with coverage"
	@echo "make check  set up, then lint, format check, types, import contracts, doctests"
	@echo "make monitor-ui  set up, then show all watched windows in the browser (evidently ui)"
	@echo "make viz    set up, then show the pipelines in the browser (kedro viz)"
	@echo "make feast  set up, then show what the feature store holds in the browser (feast ui)"
	@echo "make lock   resolve the dependencies of pyproject.toml anew into requirements.lock"
	@echo "make audit  look up known vulnerabilities of what a Bento installs (asks the network)"
	@echo "make clean  remove what runs made, models too; raw data and the environment stay"
	@echo "make distclean  remove the environment too"

setup: .venv/.installed

run: setup
	@echo "==> kedro run $(ARGS)"
	@$(BIN)/kedro run $(ARGS)

serve: setup
	@echo "==> kedro serve $(ARGS)"
	@$(BIN)/kedro serve $(ARGS)

monitor-ui: setup
	@$(BIN)/evidently ui --workspace data/08_reporting/workspace $(ARGS)

viz: setup
	@$(BIN)/kedro viz $(ARGS)

# Without an address of its own, Feast's page, which can delete views, would be open to the network.
feast: setup
	@$(BIN)/feast -c data/04_feature ui --host 127.0.0.1 $(ARGS)

# Neither kedro-airflow nor Airflow is in the lock: only who makes the DAGs again needs the first.
airflow: setup
	@$(BIN)/python -m pip install --quiet --constraint requirements.lock "kedro-airflow>=0.11"
	@$(BIN)/kedro airflow create --target-dir deploy/airflow --jinja-file deploy/airflow/dag.j2 \
		--pipelines ingestion,validation,features,feature_store,monitoring,retraining
	@$(BIN)/ruff check --quiet --fix deploy/airflow && $(BIN)/ruff format --quiet deploy/airflow

# A process for each core, but no more than four: each takes up to 2 GB, and so may what it starts.
# Another number: make test ARGS="-n 8"; one process, for a debugger: ARGS="-n 0 --pdb".
test: setup
	@echo "==> pytest $(ARGS)"
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --cov --cov-report=term $(ARGS)

check: setup
	@echo "==> lint"
	@$(BIN)/ruff check .
	@echo "==> format"
	@$(BIN)/ruff format --check .
	@echo "==> types"
	@$(BIN)/mypy
	@echo "==> import contracts"
	@$(BIN)/lint-imports
	@echo "==> doctests"
	@$(BIN)/python -m pytest -o addopts= -q --import-mode=importlib --doctest-modules src

# Each stamp is written last, so that an interrupted install is taken up again.
.venv/.installed: .venv/.locked pyproject.toml
	@echo "==> installing fathom itself"
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "==> environment ready in .venv"

.venv/.locked: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Fathom needs Python $(NEEDED) or newer, but $(PYTHON) is" \
			"$$($(PYTHON) --version 2>&1 | head -n 1)." \
			"Install a newer one, or name it: make PYTHON=/path/to/python"; exit 1; }
	@echo "==> making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@echo "==> installing requirements.lock (2 to 4 minutes the first time, 2.5 GB)"
	@$(BIN)/python -m pip install -r requirements.lock
	@touch $@

# What torch brings for one kind of machine (CUDA, Triton) and the local part of its version
# (+cpu) are left out, so that the lock installs on any of them.
lock:
	@echo "==> resolving in a clean environment"
	@rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python -m pip install ".[dev]"
	@{ sed -n '/^#/p' requirements.lock; \
		.venv-lock/bin/python -m pip freeze --all --exclude pip --exclude wheel --exclude fathom \
		| grep -Ev '^(nvidia|cuda)-|^triton==| @ ' | sed 's/+[A-Za-z0-9.]*$$//'; } > .venv-lock/new
	@mv .venv-lock/new requirements.lock && rm -rf .venv-lock
	@echo "==> requirements.lock: $$(grep -c == requirements.lock) packages"

# What a container image gets: the Bento's requirements, resolved within the lock. --strict fails
# where a package could not be looked up, which would otherwise pass for harmless.
audit: setup
	@echo "==> known vulnerabilities of what a Bento installs"
	@$(BIN)/python -c 'import yaml; \
		print(*yaml.safe_load(open("bentofile.yaml"))["python"]["packages"], sep="\n")' > .venv/bento.in
	@$(BIN)/uv pip compile --quiet --no-header --no-annotate --no-emit-index-url \
		--torch-backend cpu --constraint requirements.lock .venv/bento.in -o .venv/bento.out
	@sed 's/+[A-Za-z0-9.]*$$//' .venv/bento.out > .venv/bento.txt
	@$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement .venv/bento.txt $(ARGS)

# The raw data stays: it may be somebody's own.
clean:
	@echo "==> removing what runs made (data/02_* to data/08_*), caches and build folders"
	@find data/0[2-8]_* -mindepth 1 ! -name .gitkeep -delete
	@rm -rf build dist .viz .coverage .coverage.* htmlcov .hypothesis .import_linter_cache
	@rm -rf .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
	@find src tests benchmarks conf -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	@rm -rf .venv .venv-lock
