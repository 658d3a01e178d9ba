# make demo   set everything up and let the bundled model write Python
# make test   set everything up and run the tests; ARGS="-m metal -x" passes options to pytest
# make lint   formatter, linter, types, sizes

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := clsa backends cli tests scripts
REST := backends/mlx/clsa_mlx backends/cuda/clsa_cuda cli/clsa_cli tests scripts
SETUP := pyproject.toml constraints.txt scripts/venv.sh
ARGS ?=

.PHONY: demo test lint clean

demo: .venv/.demo
	@$(BIN)/python scripts/demo_prompt.py | $(BIN)/clsa generate --model demo --prompt - --report \
		--temp 0.6 --top-p 0.9 --repetition-penalty 1.1 --seed 4 --max-tokens 150

# One thread each: the workers would otherwise fight over the cores.
test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS) tests

lint: .venv/.test
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy --strict clsa
	$(BIN)/mypy $(REST)
	$(BIN)/python scripts/size_check.py

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +

.venv/.demo: $(SETUP)
	@scripts/venv.sh
	@echo "clsa: installing clsa[mlx] into .venv (about a minute)" >&2
	@$(PIP) -e '.[mlx]'
	@touch $@

.venv/.test: $(SETUP)
	@scripts/venv.sh
	@echo "clsa: installing clsa[mlx,train,bench,dev] and torch into .venv (a few minutes)" >&2
	@$(PIP) -e '.[mlx,train,bench,dev]' torch==2.13.0
	@touch $@ .venv/.demo
