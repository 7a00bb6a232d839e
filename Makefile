# Every target sets up what it needs, from Python 3.11 and nothing else.
.PHONY: setup demo test suite test-slow test-stress lint docs format bench clean

BIN := .venv/bin

# Some machines set it; the tests start hundreds of processes, each of which would compile our code again.
unexport PYTHONDONTWRITEBYTECODE

setup:
	@scripts/setup

# The main job on a real small teacher; writes demo/report.json and demo/report.html.
demo: setup
	$(BIN)/potstill demo

# Lint, types, the documentation site and tests, beside each other: what CI runs.
test: setup
	@$(MAKE) --no-print-directory -j3 lint docs suite

# Four processes on two cores, as those of Ray's tests and of an engine wait.
suite: setup
	$(BIN)/pytest -q -n 4

test-slow: setup
	$(BIN)/pytest -q -m slow

# The tests on a busy machine, N times, by each of torch's kinds of CPU code in turn; PATHS are some of them.
test-stress: setup
	scripts/test-stress $(or $(N),10) $(PATHS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into build/site. The variable silences the theme's notice about MkDocs 2, which it does not use.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Every figure of docs/benchmarks.md, in about three hours; each script can be run alone. One of them reads what the demo leaves
# behind. A script that misses an aim does not keep the others from running.
bench: demo/report.json
	@missed=; for script in benchmarks/bench_*.py benchmarks/student/bench_*.py benchmarks/teachers/bench_*.py; do \
	name=$$(echo $${script%.py} | tr / .); echo "== $$name"; $(BIN)/python -m $$name || missed="$$missed $$name"; done; \
	if [ -n "$$missed" ]; then echo "missed an aim or failed:$$missed"; exit 1; fi

demo/report.json:
	$(MAKE) demo

clean:
	rm -rf .venv .cache demo
