# Every target sets up what it needs: the virtual environment .venv is made once, and again when the pins change.
# With an NVIDIA GPU, .venv sees the packages that are already there (an NGC image's torch, Megatron, Transformer
# Engine) and only what is missing is installed. Without one, the exact CPU set of requirements/cpu.txt is installed.

PYTHON ?= python3
DEMO ?= smollm2
PEFT ?= none
BIN := .venv/bin
READY := .venv/.ready
TRL_READY := .venv-trl/.ready
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
TORCH := $(shell sed -n 's/^torch==//p' requirements/cpu.txt)
CPU_WHEELS := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check
# First from the indexes that pip is set up with (offline mirrors have it), then from PyTorch's own.
install_cpu_torch = $(1) install --quiet --no-deps 'torch==$(TORCH)+cpu' 2>/dev/null || \
  $(1) install --quiet --no-deps --index-url $(CPU_WHEELS) 'torch==$(TORCH)'

.PHONY: help demo test test-slow test-effect test-launch launch-packages drill bench lint format typecheck clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

demo: $(READY)  ## train SmolLM2 on human-rated reviews, before and after (DEMO=tiny: a minute, no download; PEFT=lora)
	$(BIN)/python examples/demo/run.py $(DEMO) --peft $(PEFT)

test: $(READY)  ## run the tests, without the slow ones
	$(BIN)/python -m pytest -m "not slow and not launch" $(PYTEST_ARGS)

test-slow: $(READY)  ## run the tests that take minutes each (half an hour)
	$(BIN)/python -m pytest -m "slow and not effect and not launch" $(PYTEST_ARGS)

test-effect: $(READY)  ## train SmolLM2 six times, and hold what it learns to bounds (three hours)
	$(BIN)/python -m pytest -m effect $(PYTEST_ARGS)

test-launch: $(READY) launch-packages  ## start trainings by Slurm, torchrun and in a container, and disturb them (an hour, root)
	$(BIN)/python -m pytest -m launch tests/launch $(PYTEST_ARGS)

launch-packages: $(READY)
	@missing=$$(dpkg-query --show --showformat='$${Package} $${db:Status-Status}\n' $$(cat tests/launch/packages.txt) 2>&1 \
	  | sed -nE 's/^dpkg-query: no packages found matching (.*)/\1/p; s/^(\S+) (not-installed|config-files)$$/\1/p'); \
	test -z "$$missing" && exit 0; \
	echo "test-launch needs these packages of Debian or Ubuntu: "$$missing; \
	test "$$(id -u)" = 0 || { echo "error: not root: install them first, and run the tests as root"; exit 1; }; \
	apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing
	@test ! -f requirements/launch.txt || $(PIP) install --quiet --requirement requirements/launch.txt

drill: $(READY)  ## kill, stop, starve and damage real runs, and print what was lost (half an hour)
	$(BIN)/python tests/faults/drill.py $(DRILL_ARGS)

bench: $(READY) $(TRL_READY)  ## time a KTO step beside TRL's and NeMo-Aligner's (an hour; BENCH_ARGS="--rounds 3": less)
	$(BIN)/python examples/demo/assets.py demo_out/smollm2/assets
	$(BIN)/python -m benchmarks.kto_step $(BENCH_ARGS)

lint: $(READY)  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## rewrite to the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(READY)  ## mypy --strict on floors 1 and 2
	$(BIN)/mypy

clean:  ## delete what the targets made, .venv and demo_out included
	rm -rf .venv .venv-trl demo_out build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find nemo_kto examples benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements/cpu.txt pyproject.toml
	@echo "setting up .venv (once, a few minutes)"
ifeq ($(GPU),yes)
	$(PYTHON) -m venv --system-site-packages .venv
	$(PIP) install --quiet --editable '.[dev]'
else
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: the pinned set needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(call install_cpu_torch,$(PIP))
	$(PIP) install --quiet --requirement requirements/cpu.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
endif
	@touch $@

$(TRL_READY): requirements/bench-trl.txt
	@echo "setting up .venv-trl (once, a few minutes)"
	$(PYTHON) -m venv .venv-trl
	$(call install_cpu_torch,.venv-trl/bin/python -m pip --disable-pip-version-check)
	.venv-trl/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	@touch $@
