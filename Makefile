# make train   the main job: a recurrent network learns to write Python's documentation
# make test    the quick tests, in minutes: at least one for each promise
# make test-all  the others too: killed processes, whole examples, sweeps over settings
# make check   formatting, lint, types
# make package the sdist and the wheel, checked; the wheel steps in an empty environment
# make types   how much of the public names has a type: at least TYPES_FLOOR percent
# make docs    the site, in docs/_build/html
# make lowest  the tests of what the extras are for, on the oldest versions that pyproject.toml allows
# make mutants  how many small changes to the core its tests notice, in hours; MUTANTS="--each 9" takes fewer
# make peers   installs PyTorch, Keras, TensorFlow, ...: the tests then compare with them too
# make accelerators  what XLA's compilers for GPUs and TPUs make of a step, without either: tests, and a table
# make gpu     measures and tests on a GPU, in nine minutes; the data go to OUT=gpu
#
# Each sets up what it needs in $(VENV), and uses it again when it is there. Another interpreter:
# make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
PIP_ARGS ?=
PYTEST_ARGS ?=
PY = $(VENV)/bin/python
# uv installs in a tenth of pip's time. Of pip's settings it is told where wheels lie.
INSTALL = UV_FIND_LINKS="$$($(PY) -m pip config list | sed -n "s/.*find-links='\(.*\)'/\1/p" | head -n 1)" \
    $(VENV)/bin/uv pip install --quiet $(PIP_ARGS) --python
# It leaves compiling to Python, which is to do it once and not at each start.
unexport PYTHONDONTWRITEBYTECODE

TYPES_FLOOR = 100
OUT ?= gpu
MUTANTS ?= --jobs 2
CUDA ?= cuda12
WHEEL = $(VENV)-wheel
ACCELERATORS = $(VENV)-accelerators
LOWEST = $(VENV)-lowest
LOWEST_TESTS = $(wildcard tests/test_interop*.py tests/test_diagnostics_watch.py tests/test_example*.py)

.PHONY: train test test-all check docs package types lowest mutants peers accelerators gpu format clean

train: $(VENV)/.installed
	$(PY) examples/char_rnn.py

test: SELECTION = -m 'not slow'
# Most of the time goes into compiling.
test-all: SELECTION = --unoptimized
test test-all: $(VENV)/.installed
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(SELECTION) $(PYTEST_ARGS)

check: $(VENV)/.installed
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

package: $(VENV)/.packaging
	rm -rf dist
	$(PY) -m build --no-isolation --outdir dist . > $(VENV)/build.log 2>&1 || (cat $(VENV)/build.log; exit 1)
	$(PY) -m twine check --strict dist/*
	$(PY) -m check_wheel_contents dist/*.whl
	$(PY) -m pyroma --min 10 dist/*.tar.gz
	$(PYTHON) -m venv --clear $(WHEEL)
	$(INSTALL) $(WHEEL) dist/*.whl
	JAX_PLATFORMS=cpu $(WHEEL)/bin/python -I -W error packaging/smoke.py

# pyright reads the package as it is installed, for which it has to be the PATH's python that has it.
types: package
	cd $(WHEEL) && PATH="$(abspath $(WHEEL))/bin:$$PATH" $(abspath $(VENV))/bin/pyright \
	    --verifytypes rmsprop_jax --ignoreexternal --outputjson > types.json || true
	$(PY) .ci/types $(WHEEL)/types.json $(TYPES_FLOOR)

lowest: $(VENV)/.uv
	$(PYTHON) -m venv --clear $(LOWEST)
	$(INSTALL) $(LOWEST) --resolution lowest-direct --editable '.[all]' --group test
	$(LOWEST)/bin/python -m pytest -q $(LOWEST_TESTS) $(PYTEST_ARGS)

mutants: $(VENV)/.mutants
	$(PY) -m benchmarks mutants $(MUTANTS)

$(VENV)/.mutants: $(VENV)/.installed
	$(INSTALL) $(VENV) --group mutants
	touch $@

format: $(VENV)/.installed
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# In a virtual environment of its own: PyTorch and Sphinx are large, and the other targets need neither.
# Notebooks are executed where they, or the tables in them, have changed; `make clean docs` executes all.
docs: $(DOCS_VENV)/.installed docs/_static/mathjax/tex-svg.js
	$(DOCS_VENV)/bin/python -m sphinx -W --keep-going -n -a -b html docs docs/_build/html

$(DOCS_VENV)/.installed: pyproject.toml $(VENV)/.uv
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(INSTALL) $(DOCS_VENV) --editable '.[examples]' --group docs
	touch $@

# Formulas are typeset in the browser by this one file, which the site brings along.
docs/_static/mathjax/tex-svg.js:
	mkdir -p $(@D)
	cd $(@D) && npm pack --silent mathjax@3.2.2
	tar -xzf $(@D)/mathjax-3.2.2.tgz -C $(@D) --strip-components=2 package/es5/tex-svg.js
	rm $(@D)/mathjax-3.2.2.tgz

peers: $(VENV)/.peers

# The last line's other dependencies are large, and no one optimizer needs them.
$(VENV)/.peers: $(VENV)/.installed
	$(INSTALL) $(VENV) --group peers
	$(INSTALL) $(VENV) --no-deps bitsandbytes dm-sonnet minatar stable-baselines3 timm
	touch $@

# In a virtual environment of its own: with these installed, JAX looks for GPUs and TPUs wherever it runs.
accelerators: $(ACCELERATORS)/.installed
	$(ACCELERATORS)/bin/python -m pytest -q -m accelerators tests/accelerators $(PYTEST_ARGS)
	$(ACCELERATORS)/bin/python -m benchmarks accelerators --short

# Without their dependencies: 320 MB, and neither CUDA's libraries nor a driver.
$(ACCELERATORS)/.installed: pyproject.toml $(VENV)/.uv
	test -x $(ACCELERATORS)/bin/python || $(PYTHON) -m venv $(ACCELERATORS)
	$(INSTALL) $(ACCELERATORS) --editable . --group test
	version=$$($(ACCELERATORS)/bin/python -c 'import jax; print(jax.__version__)') && \
	$(INSTALL) $(ACCELERATORS) --no-deps jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version libtpu
	touch $@

# With the interpreter's own JAX where it has one that sees the GPU.
gpu:
	if $(PYTHON) -c 'import jax, optax, pytest, tqdm; jax.devices("gpu")' 2> /dev/null; \
	then $(PYTHON) -m benchmarks gpu --out $(OUT); \
	else $(MAKE) $(VENV)/.gpu && $(PY) -m benchmarks gpu --out $(OUT); fi

$(VENV)/.gpu: $(VENV)/.installed
	$(INSTALL) $(VENV) 'jax[$(CUDA)]'
	touch $@

$(VENV)/.packaging: $(VENV)/.installed
	$(INSTALL) $(VENV) --group package
	touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.uv
	$(INSTALL) $(VENV) --editable '.[examples]' --group check --group test
	touch $@

$(VENV)/.uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check uv
	touch $@

clean:
	rm -rf .venv* dist runs docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
