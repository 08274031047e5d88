# make demo    run the whole method on this machine's CPU and print the path of the report
# make test    run the tests (10 to 20 minutes on two cores)
# make docs    build the documentation into docs/_build/html
# Each target creates .venv if it is missing or the lock has changed. PYTHON names the interpreter: 3.11 to 3.13.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test test-slow test-benchmarks check docs lock clean

demo: $(READY)
	$(BIN)/opencharacter run demo --constitution poeticism
	@echo "chat with it: $(BIN)/opencharacter chat demo poeticism"

test: $(READY)
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow --ignore tests/test_benchmarks.py

test-benchmarks: $(READY)
	$(BIN)/python -m pytest tests/test_benchmarks.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# -n and -W make broken links errors.
docs: $(READY)
	$(BIN)/python -m sphinx -b html -n -W --keep-going -q docs docs/_build/html
	@echo "documentation: docs/_build/html/index.html"

lock: $(READY)
	UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(BIN)/uv pip compile requirements/cpu.in --upgrade --no-config --no-header --no-annotate \
	  --override requirements/overrides.txt --python-version 3.11.0 --python-platform linux -o requirements/cpu.txt
	sed -i -e 's/+cpu$$//' -e '/^-e /d' -e "/'never'/d" requirements/cpu.txt
	$(BIN)/uv pip compile pyproject.toml --extra vllm --extra capabilities --constraint requirements/gpu.in --upgrade \
	  --no-config --no-header --no-annotate --generate-hashes --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
	  -o requirements/gpu.txt

$(READY): requirements/cpu.txt requirements/install.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python requirements/install.py
	@touch $@

clean:
	rm -rf .venv runs docs/_build docs/reference
