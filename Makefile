# The two commands of the README are `make up` and `make test`; the rest is for those who work on the project.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
JOBS   ?= 3
SUITE  ?= start
RUNS   := $(VENV)/.installed-to-run
STAMP  := $(VENV)/.installed
DOCS   := $(VENV)/.installed-for-docs

.PHONY: up test check format proto docs bench flame scale replay soak faults fuzz audit clean help

help:            ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(RUNS): pyproject.toml | $(VENV)/bin/python
	@echo 'installing what dynamo-redis needs into $(VENV) (once) …'
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[all]'
	@touch $@

$(STAMP): pyproject.toml $(RUNS)
	@echo 'installing what tests and checks need into $(VENV) (once) …'
	$(BIN)/python -m pip install --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --disable-pip-version-check --group dev
	@touch $@

$(DOCS): pyproject.toml | $(VENV)/bin/python
	@echo 'installing what the site of the docs needs into $(VENV) (once) …'
	$(BIN)/python -m pip install --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --disable-pip-version-check --group docs
	@touch $@

up: $(RUNS)      ## a Redis, a frontend and two mock workers (ARGS="--workers 4 …")
	@$(BIN)/dynamo-redis up $(ARGS)

test: $(STAMP)   ## all tests, against a real Redis server (JOBS=4 processes, ARGS="-k lease")
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

check: $(STAMP)  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --strict tests benchmarks faults examples tools
	$(BIN)/lint-imports

format: $(STAMP) ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

KSERVE := src/dynamo_redis/frontend/kserve
proto: $(STAMP)  ## compile the .proto file of the KServe server, after a change of it
	$(BIN)/python -m grpc_tools.protoc -I$(KSERVE) --descriptor_set_out=$(KSERVE)/inference.binpb \
	    --pyi_out=$(KSERVE) $(KSERVE)/inference.proto

docs: $(DOCS)    ## the pages as a site in .site/; a dead link is an error (ARGS="-b linkcheck" asks the web, too)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -c tools/site . .site $(ARGS)
	@echo 'open .site/index.html'

bench: $(STAMP)  ## a benchmark suite against its rivals (SUITE=start)
	$(BIN)/python -m benchmarks.$(SUITE) $(ARGS)

flame: $(STAMP)  ## a flame graph of the frontend under load, and where its time goes (ARGS="--seconds 20")
	$(BIN)/python -m benchmarks.frontend.flame $(ARGS)

scale: $(STAMP)  ## a thousand simulated workers on one Redis (ARGS="--rows L1,L6 --rounds 3")
	$(BIN)/python -m benchmarks.scale $(ARGS)

replay: $(STAMP) ## a real trace through workers and routers (TRACE=file, ARGS="--requests 2000 --modes kv,rr")
	@$(BIN)/python -m benchmarks.replay $(if $(TRACE),--trace $(TRACE)) $(ARGS)

soak: $(STAMP)   ## the same for ten minutes while parts are killed; memory must stay flat (ARGS="--minutes 2")
	@$(BIN)/python -m benchmarks.replay.soak $(ARGS)

faults: $(STAMP) ## faults of every kind against a real deployment, short (ARGS="--help" shows the long form)
	$(BIN)/python -m faults $(ARGS)

fuzz: $(STAMP)   ## a minute of fuzzing the request planes (ARGS="--seconds 600 --seed 7")
	@$(BIN)/python -c 'import atheris' 2>/dev/null || \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --group fuzz || \
	    echo 'no atheris for this platform: the decoder is fuzzed without looking at coverage'
	$(BIN)/python -m tests.fuzz $(ARGS)

audit: $(STAMP)  ## known vulnerabilities of the packages that run, by pip-audit; says so without a network
	@$(BIN)/python -m tools.audit $(ARGS)

clean:           ## remove what the targets above made
	rm -rf $(VENV) .bench .site .mypy_cache .ruff_cache .pytest_cache
