# Every target sets up what it needs; a second run installs and builds nothing without cause.
#
#   make demo    plant a backdoor in a small CLIP, find it, remove it: runs/demo/report.html
#   make test    all tests, with coverage
#   make bench   the benchmarks, against plain PyTorch
#   make data    fetch the image sets of bench-foundation by package manager, into the cache
#   make bench-foundation   what a repair leaves of a model's other tasks: runs/foundation/summary.json
#   make check-scan   a scan of 200 checkpoints, disturbed and undisturbed: runs/check-scan/summary.json
#   make bench-defenses   every attack against every defence: runs/defenses/report.html
#   make lint    ruff, mypy, clang-format
#   make setup   only what the others do first: .venv, torch, the native build
#   make clean   delete what was built (distclean: the environment .venv as well)
#
#   SEED=3                   another model and another attack in the demo
#   BENCH="--quick --data digits"   options of pydetox bench for bench-defenses
#   FOUNDATION="--quick"     options of benchmarks/bench_foundation.py
#   TORCH="torch==2.12.0"    another torch in .venv (any arguments of pip install)
#   VENV=path                an environment of yours: its torch stays, what is missing is added
#   PYTHON=python3.12        the interpreter to make .venv with
#   PYDETOX_CUDA=ON          fail without nvcc; OFF: no CUDA library; AUTO, the default: where nvcc is

VENV ?= .venv
TORCH ?= -r requirements/torch.txt
SEED ?= 0
BENCH ?=
FOUNDATION ?=
export TORCH

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo test bench bench-defenses bench-foundation data check-scan lint format clean distclean always

own := $(filter .venv,$(VENV))
python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check --no-input
# Pins hold in our own environment only: elsewhere they would change what is there.
pins := $(if $(own),-c requirements/pins.txt)
environment := $(if $(own),.venv/pyvenv.cfg,$(python))
stamps := build/setup$(if $(own),,-$(subst /,-,$(VENV)))
ready := $(stamps)/native

native_sources := pyproject.toml setup.py CMakeLists.txt $(shell find cmake csrc -type f -not -name '*.pyc')
cpp_sources = $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(ready)

demo: $(ready)
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(python) -m pydetox demo --output runs/demo --seed $(SEED)

test: $(ready)
	$(python) -m pytest -rs --cov=pydetox --cov-report=term --cov-fail-under=90

# Each file in a process of its own: what one leaves in the allocator would change the next one's figures.
bench: $(ready)
	@status=0
	for file in $(filter-out benchmarks/bench_defenses.py benchmarks/bench_foundation.py,$(wildcard benchmarks/bench_*.py)); do $(python) -m pytest "$$file" || status=1; done
	$(python) benchmarks/report.py
	exit $$status

check-scan: $(ready)
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(python) benchmarks/check_scan.py

bench-defenses: $(ready)
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(python) benchmarks/bench_defenses.py $(BENCH)

data: $(ready)
	$(python) -m pydetox.research.data

bench-foundation: data
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(python) benchmarks/bench_foundation.py $(FOUNDATION)

lint: $(ready)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(cpp_sources)

format: $(ready)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(cpp_sources)

clean:
	rm -rf build *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f pydetox/*.so
	find pydetox tests benchmarks cmake -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv

# ---- set-up: environment -> build tools -> torch -> pydetox; one chain, so that -j is safe ----------

# Checks first what would only fail after minutes of downloading.
.venv/pyvenv.cfg:
	@for name in $${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
	  if "$$name" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
	    found=$$name; break
	  fi
	done
	[ -n "$${found:-}" ] || { echo "pydetox: no Python 3.10 or later with its venv module" \
	  "(tried: $${PYTHON:-python3, python3.13 ... python3.10})" >&2; exit 1; }
	"$$found" -c 'import pathlib, sys, sysconfig
	header = pathlib.Path(sysconfig.get_path("include"), "Python.h")
	header.is_file() or sys.exit(f"pydetox: {sys.executable} has no {header}: install the headers (python3-dev)")'
	command -v "$${CXX:-c++}" g++ clang++ >/dev/null || { echo "pydetox: no C++ compiler: install g++" >&2; exit 1; }
	echo "Setting up .venv with $$("$$found" --version) (torch is large: this takes some minutes)"
	if "$$found" -c 'import ensurepip' 2>/dev/null; then
	  "$$found" -m venv .venv
	else
	  "$$found" -m venv --without-pip .venv
	  "$$found" -m pip --python .venv/bin/python install pip
	fi

ifndef own
$(python):
	@echo "pydetox: VENV=$(VENV): there is no $@" >&2; exit 1
endif

# Two notes of what the next steps depend on, rewritten only when it has changed.
$(stamps)/torch-wanted: always
	@mkdir -p $(@D); echo "$$TORCH" | cmp -s - $@ || echo "$$TORCH" > $@

$(stamps)/build-options: always
	@mkdir -p $(@D)
	options=$$({ command -v nvcc; env | grep -E '^(PYDETOX_(CUDA|EMULATOR|WERROR)|TORCH_CUDA|CUDA_HOME|CUDACXX|CXX)'; } | sort || :)
	cmp -s - $@ <<< "$$options" || cat > $@ <<< "$$options"

$(stamps)/tools: $(environment) requirements/build.txt requirements/pins.txt
	@mkdir -p $(@D)
	echo "Installing the build tools"
	$(pip) install --quiet $(pins) -r requirements/build.txt
	touch $@

# What it writes keeps the next step from exchanging the torch.
$(stamps)/torch.txt: $(stamps)/tools $(if $(own),$(stamps)/torch-wanted requirements/torch.txt requirements/torch-pins.txt)
	@$(if $(own),set -f; $(pip) install $$TORCH)
	$(pip) list --format=freeze | grep -E '^torch(vision)?==' > $@ || { echo "pydetox: $(VENV) has no torch" >&2; exit 1; }

$(ready): $(stamps)/torch.txt $(stamps)/build-options $(native_sources) $(if $(wildcard pydetox/_C.so),,always)
	@echo "Building pydetox"
	PYTHONWARNINGS=ignore $(pip) install --quiet $(pins) -c $(stamps)/torch.txt --no-build-isolation -e '.[dev]'
	touch $@
