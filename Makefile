# Two commands: `make demo` and `make test`. Both set up everything they need in .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Processes that share the tests. Many tests wait for time-outs, servers and Slurm, so two more than there are cores.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 7 ? n + 2 : 8)))
TORCH  := torch==2.13.0
LINT   := $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)

.PHONY: help demo demo-long test lint format api setup clean
.DEFAULT_GOAL := help

help:  ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: setup  ## draw captioned shapes, train a two-stage cascade on them, sample and evaluate it (5 to 13 minutes on 2 cores)
	$(BIN)/cascade prepare experiment=demo
	$(BIN)/cascade train experiment=demo stage=demo_base
	$(BIN)/cascade train experiment=demo stage=demo_sr
	$(BIN)/cascade bundle experiment=demo
	$(BIN)/cascade sample experiment=demo
	$(BIN)/cascade evaluate experiment=demo
	@echo; echo "Look at runs/demo/samples/sheet/grid.png (base beside final) and runs/demo/evaluation/"

demo-long: setup  ## the same with two objects and their relation (about 20 minutes)
	$(BIN)/cascade prepare experiment=demo_long
	$(BIN)/cascade train experiment=demo_long stage=demo_base
	$(BIN)/cascade train experiment=demo_long stage=demo_sr
	$(BIN)/cascade bundle experiment=demo_long
	$(BIN)/cascade sample experiment=demo_long
	$(BIN)/cascade evaluate experiment=demo_long

test: $(VENV)/.installed-test  ## lint, type-check and run every test
	@$(BIN)/python -m compileall -q cascade_t2i data_pipeline slurm training tests  # once, not in each process
	@echo "==> make lint, beside the tests; what it says is shown after them"
	@( $(LINT) ) > $(VENV)/lint.log 2>&1 & lint=$$!; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder --durations=15; tests=$$?; \
	wait $$lint; linted=$$?; \
	echo "==> make lint ended with code $$linted:"; cat $(VENV)/lint.log; \
	[ $$tests = 0 ] || echo "==> the tests ended with code $$tests (see above)"; \
	[ $$tests = 0 ] && [ $$linted = 0 ]

lint: $(VENV)/.installed-test  ## ruff and mypy
	$(LINT)

format: $(VENV)/.installed-test  ## format and fix with ruff
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

api: setup  ## docs/api.md from the docstrings
	$(BIN)/python docs/api.py

setup: $(VENV)/.installed  ## the virtual environment, with the exact versions of requirements.lock

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "==> virtual environment"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $$(grep -E '^(setuptools|wheel|ninja|py-cpuinfo)==' requirements.lock)
	@echo "==> torch (the CPU build where there is no GPU)"
	@sh -e install-torch.sh $(BIN)/python $(TORCH)
	@echo "==> packages of requirements.lock (a minute or two)"
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --progress-bar off -q -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -q -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements-test.lock
	@echo "==> packages of requirements-test.lock"
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --progress-bar off -q -r requirements-test.lock
	@touch $@

clean:  ## remove the environment and what the demo made
	rm -rf $(VENV) runs/demo data/demo
