# Everything a fresh machine with Python (3.10 or newer) and make needs; each target sets itself up.
PYTHON ?= python3
VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
PYTEST_ARGS ?= -q -n auto --dist worksteal

.PHONY: demo test test-oldest docs lint sanitize abi-audit clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m bam_kernels demo $(DEMO_ARGS)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# The oldest supported pair, but for what no version changes; its Triton's interpreter needs
# numpy < 2.4.
test-oldest: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python -m pytest -m "not once" $(PYTEST_ARGS)

# The documentation, into site/; fails on a broken link or reference.
docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --editable '.[docs]'
	$(VENV)/bin/python -m mkdocs build --strict

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The C++ backend's tests with its library built with sanitizers, whose runtimes must be in the
# process before anything else is: hence the preloads, and libstdc++'s, in which they look for what
# throws. Leaks are not looked for: Python itself and torch leave to the system what they hold at
# exit. Triton's interpreter is no C++ of ours, and slow under this.
SANITIZE_CXX ?= g++
SANITIZED = build/cpp-sanitized
SANITIZE_TESTS ?= $(filter-out tests/test_cpp_build.py,$(wildcard tests/test_cpp_*.py))
runtime = $(shell $(SANITIZE_CXX) -print-file-name=$(1))

sanitize: $(VENV)/.installed
	CXX='$(SANITIZE_CXX)' $(VENV)/bin/python -m bam_kernels.build_cpp --sanitize \
		--output $(SANITIZED)/lib/_C.abi3.so
	CXX='$(SANITIZE_CXX)' $(VENV)/bin/python -m bam_kernels.build_cpp --sanitize --testing \
		--output $(SANITIZED)/lib/bam_kernels_cpp_testing.so
	CXX='$(SANITIZE_CXX)' BAM_KERNELS_CPP_LIBRARY=$(SANITIZED)/lib/_C.abi3.so \
		BAM_KERNELS_TEST_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD='$(call runtime,libasan.so) $(call runtime,libubsan.so) $(call runtime,libstdc++.so)' \
		$(VENV)/bin/python -m pytest -q -s -p no:cacheprovider $(SANITIZE_TESTS)

# One binary for every supported torch and Python: only symbols that are stable.
abi-audit: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet torch-abi-audit
	$(VENV)/bin/python -m bam_kernels.build_cpp --output build/abi-audit/_C.abi3.so
	$(VENV)/bin/torch-abi-audit --check both --verbose build/abi-audit/_C.abi3.so

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
