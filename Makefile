# make demo      see a small model learn and answer, in five minutes on two cores, without network
# make test      ruff, then the tests, without those marked slow
# make test-all  ruff, then all of them
# make lint      ruff alone
# make clean     remove the environment that this file made, and caches
#
# The environment is made at first use. The file .building marks one whose installation was interrupted: it is made
# anew. An environment that somebody else made is left alone.

PYTHON ?= python3
VENV ?= .venv
RELEASES := tests/requirements-tested.txt
# In alphabetical order: the last files, which one core works on alone, are then quick ones.
PYTEST := $(VENV)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Packages are compiled when a process first imports them, a third of their files, and not all by pip.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: test test-all lint demo clean

test: lint
	$(PYTEST) -m "not slow" tests

test-all: lint
	$(PYTEST) tests

lint: $(VENV)/.built
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

demo: $(VENV)/.built
	$(VENV)/bin/python examples/demo.py

# torch goes first and alone, so that no other requirement draws in another build of it, which can be gigabytes.
$(VENV)/.built: $(RELEASES)
	@if [ -d $(VENV) ] && [ ! -e $(VENV)/.building ] && [ ! -e $@ ]; then \
	  echo "error: $(VENV) was not made by this Makefile; move it away, or use: make test VENV=.venv-test" >&2; exit 2; fi
	mkdir -p $(VENV) && touch $(VENV)/.building
	$(PYTHON) -m venv --clear $(VENV) && touch $(VENV)/.building
	$(VENV)/bin/python -m pip install -q --no-compile "$$(grep '^torch==' $(RELEASES))"
	$(VENV)/bin/python -m pip install -q --no-compile -r $(RELEASES)
	mv $(VENV)/.building $@

clean:
	if [ -e $(VENV)/.building ] || [ -e $(VENV)/.built ]; then rm -rf $(VENV); fi
	rm -rf .pytest_cache .ruff_cache
	find . -type d -name __pycache__ -prune -exec rm -rf {} +
