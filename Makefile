# Every target sets up what it needs, and no more; a second run installs and builds nothing without cause.
#
#   make demo    plant a backdoor in a small CLIP, find it, remove it: runs/demo/report.html
#   make test    all tests, with coverage
#   make bench   the benchmarks, against plain PyTorch
#   make data    fetch the image sets of bench-foundation by package manager, into the cache
#   make data-text   fetch the texts and the text model of bench-text by package manager, into the cache
#   make bench-text   text classifiers, attacked and repaired: runs/text/summary.json
#   make bench-foundation   what a repair leaves of a model's other tasks: runs/foundation/summary.json
#   make check-scan   a scan of 200 checkpoints, disturbed and undisturbed: runs/check-scan/summary.json
#   make bench-defenses   every attack against every defence: runs/defenses/report.html
#   make check-gpu   is it right on this GPU, and how fast: runs/gpu/summary.json, at most 9 minutes
#   make gpu-bundle   what a machine with a GPU and without a network needs for that: build/gpu-bundle
#   make peers   libraries that some tests compare with, beside the environment: .venv/peers
#   make lint    ruff, mypy, clang-format
#   make docs    the documentation as a web site: build/site/index.html
#   make wheel-check   build a wheel, and test it in a fresh environment with another torch
#   make setup   only what the others do first: .venv, torch, the native build, the tools of tests and lint
#   make clean   delete what was built (distclean: the environment .venv as well)
#
#   SEED=3                   another model and another attack in the demo
#   BENCH="--quick --data digits"   options of pydetox bench for bench-defenses
#   DEVICE=cuda              demo, bench, check-scan, bench-defenses and bench-foundation on a GPU; bench then also
#                            runs check-gpu, whose table shows the bounds for a GPU
#   DEVICE=cpu TINY=1        check-gpu on a CPU, in small: tries the script, measures nothing
#   LIMIT=530                seconds that check-gpu may take; what does not fit is left out and listed
#   ARCH=9.0                 compute capability of the GPU that gpu-bundle is for
#   FOUNDATION="--quick"     options of benchmarks/bench_foundation.py, bench_classes.py and bench_scan.py
#   TEXT="--quick"   options of benchmarks/bench_text.py
#   WORKERS=1                processes that test at once; each takes up to 3 GiB of memory
#   TORCH="torch==2.12.0"    another torch in .venv (any arguments of pip install)
#   WHEEL_TORCH="torch==2.13.0"   the torch that wheel-check installs the wheel beside
#   VENV=path                an environment of yours: its torch stays, what is missing is added
#   PYTHON=python3.12        the interpreter to make .venv with
#   PYDETOX_CUDA=ON          fail without nvcc; OFF: no CUDA library; AUTO, the default: where nvcc is

VENV ?= .venv
TORCH ?= -r requirements/torch.txt
SEED ?= 0
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n > 4 ? 4 : n)))
BENCH ?=
DEVICE ?= cuda
TINY ?=
LIMIT ?= 530
ARCH ?= 9.0
WHEEL_TORCH ?= torch==2.13.0
FOUNDATION ?=
TEXT ?=
# check-gpu is about a GPU unless DEVICE says otherwise; everything else is about the CPU.
where := $(if $(filter file,$(origin DEVICE)),cpu,$(DEVICE))
export TORCH

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo test bench bench-defenses check-scan check-gpu gpu-bundle peers data data-text bench-foundation bench-text lint format docs wheel-check clean distclean always

own := $(filter .venv,$(VENV))
python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check --no-input
# Pins hold in our own environment only: elsewhere they would change what is there.
pins := $(if $(own),-c requirements/pins.txt)
environment := $(if $(own),.venv/pyvenv.cfg,$(python))
stamps := build/setup$(if $(own),,-$(subst /,-,$(VENV)))
# The stages: pydetox with what it runs on; what tests and lint need beside it; the site's tools alone.
ready := $(stamps)/native
dev := $(stamps)/dev
site := $(stamps)/docs
peers := $(VENV)/peers/installed

native_sources := pyproject.toml setup.py CMakeLists.txt $(shell find cmake csrc -type f -not -name '*.pyc')
cpp_sources = $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(dev)

demo: $(ready)
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(python) -m pydetox demo --output runs/demo --seed $(SEED) --device $(where)

test: $(dev) $(peers)
	$(python) -m pytest -rs -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15 --cov=pydetox --cov-report=term --cov-fail-under=90

# Each file in a process of its own: what one leaves in the allocator would change the next one's figures.
bench: $(dev)
	@status=0
	for file in $(filter-out benchmarks/bench_defenses.py benchmarks/bench_foundation.py benchmarks/bench_classes.py benchmarks/bench_scan.py benchmarks/bench_text.py,$(wildcard benchmarks/bench_*.py)); do $(python) -m pytest "$$file" --device $(where) || status=1; done
	$(python) benchmarks/report.py --device $(where)
	$(if $(filter cuda%,$(where)),$(python) -m benchmarks.gpu --device $(where) --limit $(LIMIT) || status=1)
	exit $$status

peers: $(peers)

check-scan: $(dev)
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(python) benchmarks/check_scan.py --device $(where)

bench-defenses: $(ready)
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(python) benchmarks/bench_defenses.py --device $(where) $(BENCH)

check-gpu: $(dev)
	$(python) -m benchmarks.gpu --device $(DEVICE) --limit $(LIMIT) $(if $(TINY),--tiny)

gpu-bundle: $(dev)
	$(python) -m benchmarks.gpu.bundle --arch $(ARCH)

data: $(ready)
	$(python) -m pydetox.research.data

bench-foundation: data
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(python) benchmarks/bench_foundation.py --device $(where) $(FOUNDATION)
	$(if $(findstring --part,$(FOUNDATION)),@true,OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(python) benchmarks/bench_classes.py --device $(where) $(FOUNDATION))
	$(if $(findstring --part,$(FOUNDATION)),@true,OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(python) benchmarks/bench_scan.py --device $(where) $(FOUNDATION))

data-text: $(ready)
	$(python) -m pydetox.research.data texts

# The quick run needs no data.
bench-text: $(dev) $(if $(findstring --quick,$(TEXT)),,data-text)
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(python) benchmarks/bench_text.py $(TEXT)

lint: $(dev)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(cpp_sources)

format: $(dev)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(cpp_sources)

# Reads the sources and imports the command line alone: neither torch nor the native build.
docs: $(site)
	@# Not --quiet: it hides warnings from --strict, too.
	@NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict
	echo "the site: build/site/index.html"

wheel-check: $(ready)
	@$(python) tools/wheel_check.py --torch "$(WHEEL_TORCH)"

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
	PYTHONWARNINGS=ignore $(pip) install --quiet $(pins) -c $(stamps)/torch.txt --no-build-isolation -e '.[digits]'
	touch $@

# After pydetox, but not again each time that is built: pip then finds the native build done.
$(dev): pyproject.toml requirements/pins.txt $(stamps)/torch.txt | $(ready)
	@echo "Installing the tools of tests and lint"
	PYTHONWARNINGS=ignore $(pip) install --quiet $(pins) -c $(stamps)/torch.txt --no-build-isolation -e '.[dev]'
	touch $@

$(peers): requirements/peers.txt $(stamps)/torch.txt
	@echo "Installing the libraries that tests compare with"
	rm -rf $(@D)
	$(pip) install --quiet --no-deps --target $(@D) -r requirements/peers.txt
	touch $@

$(site): $(environment) requirements/docs.txt requirements/pins.txt
	@mkdir -p $(@D)
	echo "Installing the tools of the documentation"
	$(pip) install --quiet $(pins) -r requirements/docs.txt
	touch $@
