# The two commands of a newcomer are `make reproduce` and `make test`; both install first, from the lock, into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PAPER ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup reproduce test docs bench clean
help:
	@echo "make reproduce   draw every table and figure of the papers at demo scale (ARGS=--dry-run prints the plan)"
	@echo "make test        every check: notebooks, papers at smoke scale, command line, faults, site"
	@echo "make docs        build the site offline into _docs/"
	@echo "make bench       the speed ratios of benchmarks/, half an hour on an idle machine (ARGS='--only merge')"

setup: $(READY)

$(READY): requirements.lock setup.py settings.ini
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "medxfer_nb needs Python 3.11 or newer; try: make PYTHON=/path/to/python3.11")'
	@echo "Installing the tested versions into $(VENV): about 6 GB (PyTorch with its CUDA libraries), a few minutes."
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

reproduce: $(READY)
	$(BIN)/medxfer reproduce $(PAPER) $(ARGS)

test: $(READY)
	$(BIN)/python .ci/checks.py

docs: $(READY)
	$(BIN)/python .ci/build_site.py

bench: $(READY)
	$(BIN)/python benchmarks/bench.py $(ARGS)

clean:
	rm -rf _proc _docs build dist results
