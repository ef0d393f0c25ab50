# Type `make` to see what there is to do.

ARGS ?=
TEMPLATE := <<cookiecutter.project>>
DEMO := build/demo/my-research

# The environment: the active one where there is one (conda's base is not one to install into),
# else .venv in this folder.
ENVIRONMENT := $(or $(VIRTUAL_ENV),$(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)),$(CURDIR)/.venv)
PYTHON := $(ENVIRONMENT)/bin/python
INSTALLED := $(ENVIRONMENT)/.installed-requirements.txt
# What the tools leave behind stays out of the template, for all in there would be copied.
CACHES := $(CURDIR)/build/caches

IS_SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

# $(call make_environment,FOLDER): a new virtual environment.
define make_environment
	found=; for python in python3 python3.13 python3.12 python3.11 python; do \
	  if "$$python" -c '$(IS_SUPPORTED)' > /dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if command -v uv > /dev/null; then \
	  rm -rf "$(1)" && uv venv --quiet --python "$${found:-3.12}" "$(1)"; \
	elif [ -n "$$found" ]; then \
	  "$$found" -m venv --clear "$(1)" || { rm -rf "$(1)"; exit 1; }; \
	else \
	  echo "No Python 3.11 to 3.13 was found (python3 is $$(python3 --version 2>&1)):" \
	    "install one, or uv, which brings its own." >&2; exit 1; \
	fi
endef

# $(call install,FOLDER,REQUIREMENTS): install into an environment, with uv where it is.
define install
	echo "Installing $(2) into $(1) ..."; \
	if command -v uv > /dev/null; then \
	  uv pip install --quiet --python "$(1)/bin/python" $(2); \
	else \
	  { "$(1)/bin/python" -m pip --version > /dev/null 2>&1 \
	    || "$(1)/bin/python" -m ensurepip > /dev/null; } && \
	  "$(1)/bin/python" -m pip install --quiet --disable-pip-version-check $(2); \
	fi
endef

.DEFAULT_GOAL := help
.PHONY: help demo setup test test-all fault-test lint lock benchmark clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: ## generate a project with the defaults in build/demo and train it on the digits
	@[ -x build/cookiecutter/bin/cookiecutter ] || { \
	  $(call make_environment,build/cookiecutter) && \
	  $(call install,build/cookiecutter,-c requirements.txt cookiecutter); }
	@rm -rf build/demo && mkdir -p build/demo
	@build/cookiecutter/bin/cookiecutter . --no-input --default-config -o build/demo
	@env -u VIRTUAL_ENV -u CONDA_DEFAULT_ENV $(MAKE) --no-print-directory -C $(DEMO) train
	@echo
	@echo "The run:            $(DEMO)/results/run"
	@echo "The learning curve: $(DEMO)/results/run/learning_curve.png"

setup: ## make the tests' environment ready (.venv, or the active one)
	@[ -x "$(PYTHON)" ] || [ "$(ENVIRONMENT)" = "$(CURDIR)/.venv" ] || { \
	  echo "The active environment $(ENVIRONMENT) has no bin/python: leave it (deactivate)." >&2; exit 1; }
	@[ -x "$(PYTHON)" ] || { $(call make_environment,$(CURDIR)/.venv); }
	@"$(PYTHON)" -c '$(IS_SUPPORTED)' || { \
	  echo "$(PYTHON) is $$("$(PYTHON)" --version), but Python 3.11 to 3.13 is needed:" \
	    "leave this environment, or remove it." >&2; exit 1; }
	@cmp -s requirements.txt "$(INSTALLED)" || { \
	  $(call install,$(ENVIRONMENT),-r requirements.txt) && cp requirements.txt "$(INSTALLED)"; }

# Where Python may not write what it compiles, every process would compile TensorFlow for itself.
COMPILED_ONCE = env -u PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX="$(CACHES)"
PYTEST = $(COMPILED_ONCE) MYPY_CACHE_DIR="$(CACHES)/mypy-template" "$(PYTHON)" -m pytest -o cache_dir="$(CACHES)/pytest"
# One more than there are cores, for tests often wait; each takes about a gigabyte.
PROCESSES = $(shell "$(PYTHON)" -c 'import os; print(min(os.cpu_count() + 1, 4))')
FAULT_TESTS := tests/test_faults.py tests/test_faults_disk.py tests/test_faults_iterators.py \
  tests/test_faults_distribution.py tests/test_check_resume.py tests/test_slurm.py \
  tests/test_torch.py tests/engine/test_sweep.py tests/engine/test_search.py

IN_PARALLEL = -n $(PROCESSES) --dist=loadfile --no-loadscope-reorder

test: setup ## run the quick tests: each command, each kind of fault (ARGS='-k resume' for some)
	@$(PYTEST) $(IN_PARALLEL) -m "not slow" $(ARGS)

test-all: setup ## run all the other tests, which takes half an hour (ARGS='-k cruft' for some)
	@$(PYTEST) $(IN_PARALLEL) -m slow $(ARGS)

fault-test: setup ## break runs in all ways, which takes hours
	@TEMPLATE_FAULT_TESTS_WHOLE=1 $(PYTEST) $(IN_PARALLEL) $(FAULT_TESTS) $(ARGS)

lint: setup ## check style and types, here and in the template
	@"$(PYTHON)" -m ruff check --cache-dir "$(CACHES)/ruff" .
	@"$(PYTHON)" -m ruff format --cache-dir "$(CACHES)/ruff" --check .
	@"$(PYTHON)" -m mypy --cache-dir "$(CACHES)/mypy"
	@cd "$(TEMPLATE)" && "$(PYTHON)" -m mypy --cache-dir "$(CACHES)/mypy-template"

lock: setup ## write both requirements.txt again: the newest versions that go together
	@command -v uv > /dev/null || { echo "make lock needs uv: pip install uv" >&2; exit 1; }
	@PATH="$(ENVIRONMENT)/bin:$$PATH" "$(PYTHON)" .ci/lock.py

benchmark: setup ## measure how long things take, compared with model.fit and, if it is installed, PyTorch
	@$(COMPILED_ONCE) "$(PYTHON)" benchmarks/startup.py
	@$(COMPILED_ONCE) "$(PYTHON)" benchmarks/loop.py $(ARGS)
	@$(COMPILED_ONCE) "$(PYTHON)" benchmarks/ports.py
	@$(COMPILED_ONCE) "$(PYTHON)" benchmarks/feeder.py
	@$(COMPILED_ONCE) "$(PYTHON)" benchmarks/runs.py
	@$(COMPILED_ONCE) "$(PYTHON)" benchmarks/sweep.py
	@$(COMPILED_ONCE) "$(PYTHON)" benchmarks/scale.py

clean: ## remove .venv, build and the tools' caches
	@rm -rf build .venv .pytest_cache .mypy_cache .ruff_cache
