# Three commands a newcomer needs: make demo, make test, make lint. Each makes .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
OLDEST := .venv-oldest

.PHONY: demo test test-slow test-deep test-oldest lint docs browser clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/petra-zoo demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

test-deep: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal -m deep

# The tests with the lowest versions that pyproject.toml allows, in an environment of their own. Versions this old have
# wheels for Python 3.11 and 3.12 only.
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[test]'
	touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n auto --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	ln -sfn ../converters petra_zoo/converters  # mypy looks for petra_zoo.converters where it is installed
	$(BIN)/mypy

# The site of README.md, docs/ and benchmarks/, with what makes it: see docs/conf.py.
.venv/.docs-installed: $(STAMP) pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: .venv/.docs-installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -c docs -d build/doctrees . build/docs
	@echo "saved build/docs/index.html"

# The browser for the tests marked browser (Debian and Ubuntu, as root); without it they are skipped.
browser:
	command -v chromium && command -v chromedriver || { apt-get update -qq && apt-get install -y -qq chromium chromium-driver; }

clean:
	rm -rf .venv $(OLDEST) build dist *.egg-info
