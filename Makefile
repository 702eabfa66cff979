# Each target is complete: the first call makes .venv, a later call makes it anew only when what is installed has changed.
PY := .venv/bin/python
INSTALLED := .venv/.installed

# The tests start many a Python. Compiled modules are kept, or each compiles torch and fastai anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := test
.PHONY: demo test test-all docs prepare bench clean

$(INSTALLED): pyproject.toml settings.ini setup.py
	python3 -m venv .venv
	$(PY) -m pip install --quiet uv
	.venv/bin/uv pip install --quiet --python $(PY) --editable '.[dev]'
	touch $@

# Train the small model of the demo and show what the run remembers.
demo: $(INSTALLED)
	$(PY) -m fastai_xent.demo

# Run every notebook and every test but the slow ones.
test: $(INSTALLED)
	$(PY) -m pytest -n auto --dist worksteal -m 'not slow'

# Run every notebook and every test.
test-all: $(INSTALLED)
	$(PY) -m pytest -n auto --dist worksteal

# Build the site into _docs, and check it.
docs: $(INSTALLED)
	$(PY) tools/site.py

# Bring the modules and README.md in step with the notebooks.
prepare: $(INSTALLED)
	.venv/bin/nbdev-clean
	.venv/bin/nbdev-export
	$(PY) tools/readme.py

# Run every benchmark.
bench: $(INSTALLED)
	for f in benchmarks/[a-z]*.py; do echo "== $$f"; $(PY) $$f || exit 1; done

# Remove what the other targets made, .venv excepted.
clean:
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
