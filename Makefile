# make demo, make test, make lint, make docs: each sets up all that it needs in .venv. Python 3.11 or newer is the one thing to have;
# where python3 is another one: make test PYTHON=/path/to/python3.12

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

.PHONY: demo test lint docs clean

demo: .venv/demo.stamp
	rm -rf $(DEMO)
	for model in mlp convnet; do for method in gmp rigl; do \
	  $(BIN)/niwaki run $$method --task digits --model $$model --sparsity 0.9 --out $(DEMO)/$$model-$$method || exit 1; done; done
	$(BIN)/niwaki compare $(DEMO)/* --report $(DEMO)/comparison.html

# One thread a process: the tests run in several processes, and torch's own threads would only get into each other's way.
test: lint docs
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal

lint: .venv/develop.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy src
	$(BIN)/lint-imports

docs: .venv/develop.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

clean:
	rm -rf .venv build dist runs .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

.venv/demo.stamp: EXTRAS := demo
.venv/develop.stamp: EXTRAS := demo,hf,test,docs

# A stamp stands for "these extras are installed"; it is older than pyproject.toml or constraints.txt when they must be installed anew.
.venv/%.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Niwaki needs Python 3.11 or newer, and $(PYTHON) is not (`$(PYTHON) --version 2>&1`); name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@
