# make demo      set up, then train, evaluate and look at a small PANet on the embedded dataset
# make test      set up, then run the linters and the test suite
# make test-all  the same, with the tests that take minutes each: faults, fuzzing, load, export
# make test-gpu  set up, then run the tests that need a CUDA device; fails where there is none
# make test-downstream
#                set up another environment, with SAHI, supervision, layoutparser and grad-cam,
#                and test with them
# make setup     only set up: .venv with everything in it
# make lint      only the linters: ruff, codespell and mypy
# make docs      set up, then build the documentation in site/; a warning is an error
# make clean     remove .venv, site and what the demo wrote
#
# PYTHON=python3.11       the Python that .venv is made with
# VENV=/path/to/env       use this virtual environment instead of .venv
# DETECTRON2=REQUIREMENT  install Detectron2 from this pip requirement, for instance
#                         git+https://github.com/facebookresearch/detectron2.git

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
DETECTRON2 ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.panet_d2-installed
DEMO := output/demo

.PHONY: demo test test-all test-gpu test-downstream setup lint docs clean FORCE

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Another Detectron2 than the one installed last is asked for.
ifneq ($(DETECTRON2),)
ifneq ($(DETECTRON2),$(shell cat $(STAMP) 2>/dev/null))
$(STAMP): FORCE
endif
endif
FORCE:

# An importable Detectron2 is left alone, unless another one is asked for.
$(STAMP): pyproject.toml setup.py $(wildcard requirements/*.txt) | $(BIN)/python
	$(PIP) install -q -c requirements/constraints.txt -r requirements/detectron2-deps.txt -e '.[dev]'
	@if [ -n "$(DETECTRON2)" ]; then \
		echo "Installing Detectron2 from $(DETECTRON2)"; \
		$(PIP) install -q --no-build-isolation -c requirements/constraints.txt "$(DETECTRON2)"; \
	elif ! $(BIN)/python -c 'import detectron2' 2>/dev/null; then \
		echo "Installing Detectron2"; \
		$(PIP) install -q --no-deps --require-hashes --only-binary=:all: --python-version 3.10 \
			--target "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
			-r requirements/detectron2.txt; \
	fi
	@$(BIN)/python -W ignore -c 'import detectron2, panet_d2; print("panet_d2", panet_d2.__version__, "on Detectron2", detectron2.__version__)'
	@echo '$(DETECTRON2)' > $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	@# Types are checked where torch and numpy have the pinned versions.
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "$(BIN)/mypy"; $(BIN)/mypy; \
	else \
		echo "Skipping mypy: it needs Python 3.11 or later"; \
	fi

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: lint
	$(BIN)/python -m pytest

test-all: lint
	$(BIN)/python -m pytest -m 'slow or not slow' --durations 20

# Few processes at once, because each takes memory of the GPU.
test-gpu: $(STAMP)
	@$(BIN)/python -W ignore -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make test-gpu needs a CUDA device, and torch " + torch.__version__ + " finds none.")'
	$(BIN)/python -m pytest -n 4 -m cuda

# In an environment of its own, because these programs install another OpenCV over ours.
test-downstream:
	$(MAKE) setup VENV=$(VENV)/downstream
	$(VENV)/downstream/bin/python -m pip --disable-pip-version-check install -q \
		-c requirements/constraints.txt -r requirements/downstream.txt
	$(VENV)/downstream/bin/python -m pytest -n0 tests/downstream

# glibc gives large blocks back to the system at once, and every training step asks for them again;
# keeping them makes a step on the CPU a sixth faster.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_TOP_PAD_=100000000

# Trained and evaluated once; repeating `make demo` draws and scores its results again.
$(DEMO)/model_final.pth: | $(STAMP)
	rm -rf $(DEMO)
	$(KEEP_MEMORY) $(BIN)/python -W ignore train_net.py --config-file configs/Shapes/demo.yaml OUTPUT_DIR $(DEMO)

demo: $(STAMP) $(DEMO)/model_final.pth
	@$(BIN)/python -W ignore tools/visualize.py predictions --config-file $(DEMO)/config.yaml --output $(DEMO)/pictures

clean:
	rm -rf .venv site $(DEMO)
