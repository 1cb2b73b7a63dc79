# make install | demo | test | lint | clean. Each sets up what it needs first.
#
#   make test PYTHON=python3.12         another interpreter, 3.11 or newer
#   make demo EXTRAS=test,lint,cuda     with an NVIDIA GPU; tpu for a TPU
#   make test VENV=/elsewhere/venv      another place for the environment
#
# An existing environment keeps its interpreter: `make clean` to change it.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test,lint

comma := ,
python := $(VENV)/bin/python
# Newer than what it was installed from, or the environment is brought up again.
stamp := $(VENV)/installed-$(subst $(comma),-,$(EXTRAS))

.PHONY: install demo test lint clean

install: $(stamp)

demo: $(stamp)
	$(python) main.py --config=configs/shapes.py --workdir=runs/demo

test: $(stamp)
	$(python) -m pytest -q -n auto --dist loadfile -rs

lint: $(stamp)
	$(python) -m ruff check .
	$(python) -m ruff format --check .

clean:
	rm -rf .venv runs/demo build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(stamp): setup.cfg pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than Python 3.11." \
	    "Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(VENV)/bin/pip || $(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) cannot make virtual environments (no ensurepip)." \
	    "On Debian or Ubuntu: apt install python3-venv." \
	    "Elsewhere name another one: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(python) -m pip install --quiet --disable-pip-version-check \
	  -r requirements.lock -e '.[$(EXTRAS)]'
	@touch $@
