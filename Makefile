# `make demo` and `make test` need nothing but Python 3.12 or newer; the rest is for developers.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint aot sanitize clean

demo: $(VENV)/.installed
	$(BIN)/kvc demo

# Two runs, for part of what makes compiling cheap holds for a whole process (tests/conftest.py).
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not optimized"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m optimized \
	  $$(grep -rl --include='test_*.py' 'mark\.optimized' tests)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

# Compiles all GPU kernels for H200, A100 and L4 without a GPU. The CUDA plugin's wheels (700 MB unpacked) go to a
# folder of their own: in the environment, JAX would look for a GPU at every start. Without a network: one line.
aot: $(VENV)/.installed
	@[ -e .aot/.installed ] || { $(BIN)/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["aot"], sep="\n")' \
	  > .aot-requirements.txt && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --target .aot -c constraints.txt -r .aot-requirements.txt >/dev/null 2>&1 && touch .aot/.installed; } || true
	@rm -f .aot-requirements.txt
	$(BIN)/python tests/aot/compile_kernels.py --site .aot

# On a GPU machine: memory errors of the kernels, on a small part of the GPU tests.
sanitize:
	scripts/sanitize.sh

# Python compiles what is imported by itself; pip would compile all there is, one file after the other, for a minute.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 12) else \
	  "kvc_jax needs Python 3.12 or newer, but $(PYTHON) is %d.%d; run make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .aot build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
