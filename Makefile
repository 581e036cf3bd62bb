# Needs nothing but make and Python >= 3.11: every target makes the environment it uses.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes by default: torch start-up dominates the quick suite on small machines.
JOBS ?= 2

.PHONY: demo test slow lint package bench gpu clean

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else "redistill needs Python >= 3.11, found %d.%d; try make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

# The files beside the code that a wheel must contain.
define CHECK_PACKAGE_DATA
from importlib.resources import files
package = files("redistill")
for name in ("demo/teacher.safetensors", "report/templates/report.html", "report/templates/style.css", "py.typed"):
    assert package.joinpath(name).is_file(), f"the wheel lacks {name}"
endef
export CHECK_PACKAGE_DATA

demo: $(VENV)/.installed
	$(BIN)/redistill demo --out demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS)

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS) -m slow --timeout 3600

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds sdist and wheel, and installs the wheel into an empty environment outside the source tree.
package: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	set -e; empty=$$(mktemp -d); trap 'rm -rf "$$empty"' EXIT; \
	$(PYTHON) -m venv "$$empty"; \
	"$$empty/bin/python" -m pip install --quiet dist/*.whl; \
	cd "$$empty"; bin/redistill --version; bin/python -c "$$CHECK_PACKAGE_DATA"

bench: $(VENV)/.installed
	$(BIN)/python bench/run.py

# Acceptance on one GPU, in at most eight minutes; without one, it says so and ends with code 3.
gpu: $(VENV)/.installed
	$(BIN)/python bench/gpu.py

clean:
	rm -rf $(VENV) demo build dist *.egg-info
