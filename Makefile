# make demo    run the whole method on this machine's CPU and print the path of the report
# make test    run the tests (under 10 minutes)
# make docs    build the documentation into docs/_build/html
# Each target creates .venv if it is missing or the lock has changed. The lock needs the CPU build of torch. If pip's
# default index does not have it, name one that does: PIP_EXTRA_INDEX_URL=<the PyTorch CPU index> make demo

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test test-slow check docs lock clean

demo: $(READY)
	$(BIN)/opencharacter run demo --constitution poeticism
	@echo "chat with it: $(BIN)/opencharacter chat demo poeticism"

test: $(READY)
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# -n and -W make broken links errors.
docs: $(READY)
	$(BIN)/python -m sphinx -b html -n -W --keep-going -q docs docs/_build/html
	@echo "documentation: docs/_build/html/index.html"

lock: $(READY)
	UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(BIN)/uv pip compile requirements/cpu.in --upgrade --no-header --no-annotate \
	  --override requirements/overrides.txt --python-version 3.11 --python-platform linux -o requirements/cpu.txt
	sed -i -e 's/+cpu$$//' -e '/^-e /d' -e "/'never'/d" requirements/cpu.txt

$(READY): requirements/cpu.txt pyproject.toml
	@echo "installing into .venv: about 3 minutes and 4 GB the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -c "import torch" 2> /dev/null || { $(BIN)/python -m pip uninstall --quiet --yes torch; \
	  echo "pip found no CPU build of torch; name an index that has one: PIP_EXTRA_INDEX_URL=<the PyTorch CPU index> make"; exit 1; }
	@touch $@

clean:
	rm -rf .venv runs docs/_build docs/reference
