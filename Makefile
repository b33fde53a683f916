# make train   the main job: a recurrent network learns to write Python's documentation
# make test    the test-suite
# make check   formatting, lint, types
# make docs    the site, in docs/_build/html
# make peers   installs PyTorch, Keras, TensorFlow, ...: `make test` then compares with them too
#
# Each sets up what it needs in $(VENV), and uses it again when it is there. Another interpreter:
# make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
PIP_ARGS ?=
PYTEST_ARGS ?=
PY = $(VENV)/bin/python

.PHONY: train test check docs peers format clean

train: $(VENV)/.installed
	$(PY) examples/char_rnn.py

test: $(VENV)/.installed
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: $(VENV)/.installed
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(VENV)/.installed
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# In a virtual environment of its own: PyTorch and Sphinx are large, and the other targets need neither.
# Notebooks are executed where they, or the tables in them, have changed; `make clean docs` executes all.
docs: $(DOCS_VENV)/.installed docs/_static/mathjax/tex-svg.js
	$(DOCS_VENV)/bin/python -m sphinx -W --keep-going -n -a -b html docs docs/_build/html

$(DOCS_VENV)/.installed: pyproject.toml
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(DOCS_VENV)/bin/python -m pip install --quiet --editable '.[examples]' --group docs $(PIP_ARGS)
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
	$(PY) -m pip install --quiet --group peers $(PIP_ARGS)
	$(PY) -m pip install --quiet --no-deps bitsandbytes dm-sonnet stable-baselines3 timm $(PIP_ARGS)
	touch $@

# pip understands dependency groups from 25.1 on.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade 'pip>=25.1'
	$(PY) -m pip install --quiet --editable '.[examples]' --group check --group test $(PIP_ARGS)
	touch $@

clean:
	rm -rf .venv* runs docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
