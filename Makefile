# make demo      install, then generate text with SmolLM2-135M-Instruct, plain and by a ladder of three rungs
# make test      the tests that this machine can run; without a GPU every sixth case of the kernels' tests, which its interpreter is slow at
# make test-all  all of them
# make test-gpu  the tests that need a GPU
# make check     ruff and mypy
#
# PYTHON=python3.12   interpreter that .venv is made from (3.10 or later)
# DEVICE=cpu|gpu      which torch to install; by default gpu where nvidia-smi lists one
# JOBS=auto           test processes: by default one more than cores up to four, and one where there is a GPU
# RUN=python3         use this interpreter as it is and install nothing

PYTHON ?= python3
DEVICE ?= auto
RUN ?= .venv/bin/python
JOBS ?= auto
READY := $(if $(filter .venv/bin/python,$(RUN)),.venv/.ready)

.PHONY: demo test test-all test-gpu check env
.DEFAULT_GOAL := demo

demo: $(READY)
	$(RUN) -m rowcast generate --chat --max-tokens 96 "Explain in three sentences why the sky is blue."
	@echo
	$(RUN) examples/ladder.py

# Workers steal from each other, since few tests take most of the time. Without pytest-xdist one process runs all.
test: $(READY)
	$(RUN) -m pytest $(CASES) $$($(RUN) -c 'import xdist' 2>/dev/null && printf '%s' '-n $(JOBS) --dist worksteal')

test-all: CASES := --every 1
test-all: test

test-gpu: $(READY)
	$(RUN) -m pytest -m gpu $(sort $(wildcard tests/test_gpu_*.py) $(shell grep -l 'mark\.gpu\|take_arrays_as_bounds' tests/test_*.py))

check: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

env: $(READY)

.venv/.ready: pyproject.toml constraints-cpu.txt tools/setup.sh
	PYTHON="$(PYTHON)" DEVICE="$(DEVICE)" bash tools/setup.sh .venv
	@touch $@
