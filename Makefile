# make train   the main job: a recurrent network learns to write Python's documentation
# make test    the test-suite
# make check   formatting, lint, types
# make peers   installs PyTorch, Keras, TensorFlow, ...: `make test` then compares with them too
#
# Each sets up what it needs in $(VENV), and uses it again when it is there. Another interpreter:
# make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
PY = $(VENV)/bin/python

.PHONY: train test check peers format clean

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
	rm -rf .venv* runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
