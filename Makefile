# Everything a fresh machine with Python (3.10 or newer) and make needs; each target sets itself up.
PYTHON ?= python3
VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
PYTEST_ARGS ?= -q -n auto

.PHONY: demo test test-oldest lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m bam_kernels demo $(DEMO_ARGS)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# The oldest supported pair; this Triton's interpreter needs numpy < 2.4.
test-oldest: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

$(OLDEST_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST_VENV)/bin/python -m pip install --quiet --editable '.[test]' \
		torch==2.11.0 triton==3.6.0 'numpy<2.4' torchvision==0.26.0
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST_VENV) build *.egg-info
