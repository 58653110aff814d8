# make setup | test | lint | demo | docs | clean
# make up | down | drill | faults | deploy-check | deploy-rules | lock
# make page | test-page | page-screenshots | page-fuzz
# make embedded-model | accuracy | several-questions | equal-cost | choices | search | reproduce | ablations | bench | loadtest
# make elastic-sweep
# make bench-smoke | soak | soak-replicas
#
# Everything runs in .venv, which is made on first use (about 3 minutes) and left alone as long as pyproject.toml stays
# the same. Another interpreter:  make PYTHON=python3.12
# A machine with a CUDA GPU:      make EXTRAS=gpu,serve,search,loadtest,deploy,dev

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= cpu,serve,search,loadtest,deploy,dev
# Address of PyTorch's CPU wheel index, where pip's own configuration doesn't name it (CONTRIBUTING.md, "Set up").
TORCH_INDEX ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
# mypy takes packages from the path, and search/ is imported as eos_search: this link tells it so.
MYPY_LINKS := .cache/mypy
# Two processes that take about as long: engines within the process in one, servers and all others in the other.
ENGINES := tests/parity
# Of the page what needs no server; the rest is `make test-page`.
PAGE := tests/page/test_page_files.py
OTHERS := $(PAGE) $(filter-out $(ENGINES) tests/page tests/__pycache__,$(patsubst %/,%,$(sort $(wildcard tests/*/)))) $(wildcard tests/test_*.py)

CHECK_PYTHON := import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	"eos-vllm needs Python 3.11, 3.12 or 3.13; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % v)

.PHONY: setup test test-engines test-others lint demo docs clean up down drill faults deploy-check deploy-rules lock
.PHONY: page test-page page-screenshots page-fuzz
.PHONY: embedded-model accuracy several-questions equal-cost choices search reproduce ablations bench loadtest elastic-sweep bench-smoke soak soak-replicas

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	@echo "Setting up $(VENV): about 3 minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[$(EXTRAS)]'
	$(BIN)/eos-vllm doctor --fix
	@touch $@

test: setup lint
	$(MAKE) --jobs=2 --output-sync=line test-engines test-others

test-engines:
	$(BIN)/python -m pytest $(ENGINES)

test-others:
	$(BIN)/python -m pytest $(OTHERS)

# The page in a browser, before a server of its own (a minute and a half).
test-page: setup
	$(BIN)/python -m pytest tests/page

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p $(MYPY_LINKS) && ln -sfn ../../search $(MYPY_LINKS)/eos_search
	MYPYPATH=$(MYPY_LINKS) $(BIN)/mypy

demo: setup
	$(BIN)/eos-vllm demo
	@echo "To see which patches are kept, in a browser: make page"

# The embedded model with its page, until Ctrl-C; another port: make page PAGE_PORT=8700.
PAGE_PORT ?= 8600
page: setup
	$(BIN)/eos-vllm page --port $(PAGE_PORT)

# Pictures of the page in docs/page; Debian's Chromium (apt-get install chromium).
page-screenshots: setup
	PYTHONPATH=tests $(BIN)/python tests/page/screenshots.py

# Five minutes of schemathesis against the page's paths, from an environment of its own: its dependencies are not ours.
FUZZ := .cache/schemathesis
page-fuzz: setup
	@test -x $(FUZZ)/bin/schemathesis || { $(PYTHON) -m venv $(FUZZ) && $(FUZZ)/bin/pip install --quiet 'schemathesis>=4,<5'; }
	PYTHONPATH=tests $(BIN)/python tests/page/fuzz.py --schemathesis $(FUZZ)/bin/schemathesis

# Trains an embedded model from nothing; what was stopped goes on from its checkpoint in .cache/.
# RECIPE=clutter1: the packaged one (80 minutes on two busy cores; less with a GPU). Marks it, writes its card, and only
#   then takes it into the package.
# RECIPE=clutter2: 12 layers, on ClutterVQA 2, told nowhere where to read (docs/cluttervqa.md); clutter2-early and
#   clutter2-late: made to read early, or late. Writes runs/RECIPE, marks it, and says whether the benchmark discriminates.
RECIPE ?= clutter1
ifeq ($(RECIPE),clutter1)
NEW_MODEL := .cache/embedded-files
embedded-model: setup
	rm -rf $(NEW_MODEL)
	$(BIN)/python -m eos_search.training --out $(NEW_MODEL) --record results/embedded-training.json
	rm -f results/embedded-heldout.json
	$(BIN)/eos-search evaluate --model $(NEW_MODEL) --profiles none,blind --images 3600 --per-kind 2000 \
		--out results/embedded-heldout.json
	$(BIN)/python -m eos_search.training.card $(NEW_MODEL)
	rm -rf eos_vllm/models/embedded/files && mv $(NEW_MODEL) eos_vllm/models/embedded/files
	rm -rf .cache/embedded-model
else
NEW_MODEL := runs/$(RECIPE)
# The planted ones share the first stages of clutter2: where those are trained, they begin behind them.
BEHIND := $(if $(filter clutter2-%,$(RECIPE)),$(if $(wildcard .cache/clutter2/after-shallow.pt),--behind .cache/clutter2))
embedded-model: setup
	test -f $(NEW_MODEL)/model.safetensors || { rm -f results/$(RECIPE)-*.json; \
		$(BIN)/python -m eos_search.training --recipe $(RECIPE) --work .cache/$(RECIPE) $(BEHIND) --out $(NEW_MODEL) \
		--record results/$(RECIPE)-training.json; }
	$(BIN)/eos-search evaluate --model $(NEW_MODEL) --benchmark-version 2 --profiles none,blind --images 1200 \
		--per-kind 600 --out results/$(RECIPE)-heldout.json
	$(BIN)/eos-search discriminates --model $(NEW_MODEL) --images 600 --per-kind 300 \
		--selectors maxmin,mmr,coverage,received,rarity,cls \
		--out results/$(RECIPE)-discriminates.json
endif

# Accuracy against the retain budget: measures what results/embedded-accuracy.json doesn't hold yet, and draws it.
P := embedded-searched
ACCURACY := none,$P,prune@$P,merge@$P,pool@$P,reweight@$P,random@$P,oracle@$P,embedded-fastv,random@embedded-fastv,\
	embedded-sparsevlm-v2,embedded-tome-style
accuracy: setup
	$(BIN)/eos-search evaluate --profiles '$(ACCURACY)' --images 320 --per-kind 200 --out results/embedded-accuracy.json \
		--figure docs/embedded-accuracy.png --page docs/results.md --against $P

# Several questions about one image: tokens chosen by the question, by another one, by the image; and rounded counts.
Q := embedded-searched embedded-fastv embedded-sparsevlm-v2
SEVERAL := results/several-questions.json
comma := ,
empty :=
CASES := none$(subst $(empty) $(empty),,$(foreach q,$Q,$(comma)$q$(comma)earlier@$q$(comma)image@$q$(comma)rounded@$q))
several-questions: setup
	$(BIN)/eos-search evaluate --budgets 192,64,32 --images 120 --out $(SEVERAL) --profiles '$(CASES)'
	for q in $Q; do $(BIN)/eos-search evaluate --table $(SEVERAL) --against $$q | sed -n '/minus the others/,$$p'; done

# Selectors and profiles at equal cost, accuracy and speed, and their page; goes on where it was stopped (an hour, quiet).
equal-cost: setup
	$(BIN)/python -m benchmarks.equal_cost --out results/equal-cost.json
	$(BIN)/python -m benchmarks.equal_cost --table results/equal-cost.json --page docs/equal-cost.md

# Accuracy against cost for the page and for `eos-vllm advise`, from committed raw results; measures nothing.
choices: setup
	$(BIN)/python -m benchmarks.choices

# Searches a profile on the embedded model; what was stopped goes on with --resume.
search: setup
	$(BIN)/eos-search run --config embedded
	$(BIN)/eos-search plot search --run runs/embedded --out runs/embedded/search.png

# The paper's search on LLaVA-1.5-7B (a GPU) and its Tables 4, 7 and 8, with lmms-eval in an environment of its own:
#   make reproduce MODEL=llava-hf/llava-1.5-7b-hf DATA=llava_v1_5_mix665k.json LMMS=../lmms/bin/python
# MODEL=embedded: the same from end to end in minutes on two cores, in few steps and on a small local task. More options:
#   REPRODUCE='--config llava-1.5-7b-paper --limit 500'. Goes on where it was stopped.
MODEL ?= embedded
DATA ?=
LMMS ?=
REPRODUCE ?=
reproduce: setup
	$(BIN)/eos-search reproduce --model '$(MODEL)' $(if $(DATA),--data '$(DATA)') $(if $(LMMS),--python '$(LMMS)') $(REPRODUCE)

# The paper's studies on the searched profile of the embedded model, and their figures; goes on where it was stopped.
ABLATE := $(BIN)/eos-search ablate
PLOT := $(BIN)/eos-search plot
STUDIES := results/studies
T := $(STUDIES)/trials
TRIALS := $T/one-budget.json,$T/four-budgets.json,$T/aligned.json,$T/aligned-warm.json,$P,$T/searched-relevant-text.json,\
	$T/searched-last-text.json
# The paper's weights of the alignment (Fig. 4; with CE-off its eight points), and the committed search's own, 1.
LAMBDAS := 0,0.01,0.02,0.05,0.1,0.2,0.5,1
ablations: setup
	$(ABLATE) alignment --config embedded --steps 100 --lambdas '$(LAMBDAS)' --per-kind 40 --out $(STUDIES)/alignment.json
	$(ABLATE) placement --profile $P --budgets 64,16 --per-kind 40 --out $(STUDIES)/placement.json
	$(ABLATE) operator --profile $P --budgets 192,64,16 --per-kind 20 --out $(STUDIES)/operator.json
	$(ABLATE) robustness --profile $P --budgets 64,16 --per-kind 40 --out $(STUDIES)/robustness.json
	$(ABLATE) budgets --profiles '$(TRIALS)' --split validation --budgets 192,64,16 --per-kind 40 --out $(STUDIES)/trials.json
	$(ABLATE) gradients --config embedded --run results/embedded-search --budgets own,32 --out $(STUDIES)/gradients.json
	for study in alignment placement operator robustness gradients; do \
		$(PLOT) $$study --raw $(STUDIES)/$$study.json --out docs/studies/$$study.png || exit 1; done
	$(PLOT) margin --raw results/embedded-accuracy.json --profile $P --against prune@$P --out docs/studies/margin.png
	$(PLOT) profile --profile $P --budgets 192,64,16 --out docs/studies/profile.png
	$(PLOT) patches --profile $P --budgets 192,64,16 --out docs/studies/patches.png
	$(PLOT) search --run results/embedded-search --out docs/studies/search.png
	$(PLOT) equivalence --out docs/studies/equivalence.png

bench: setup
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.decode_step
	$(BIN)/python -m benchmarks.compiled_reduction
	$(BIN)/python -m benchmarks.host_cost
	$(BIN)/python -m benchmarks.trace_cost

# Stock against eos over HTTP, scenario by scenario; goes on where it was stopped, or where its minutes were over.
LOADTEST ?= runs/loadtest
loadtest: setup
	$(BIN)/python -m loadtests.sweep --out $(LOADTEST)
	$(BIN)/python -m loadtests.report $(LOADTEST) --markdown

# Budgets that follow the load against fixed ones and stock, at arrival rates around stock's capacity: an hour; goes on
# where it was stopped. Figure and tables alone: the second line.
ELASTIC ?= runs/elastic
elastic-sweep: setup
	$(BIN)/python -m loadtests.elastic_sweep --out $(ELASTIC)
	$(BIN)/python -m loadtests.elastic_report $(ELASTIC) --figure docs/elastic.png --readme README.md

# Minutes; fails when eos at budget 64 falls below the committed floor (loadtests/floor.json).
bench-smoke: setup
	$(BIN)/python -m loadtests.guard

# Half an hour of saturation with aborted streams and broken requests.
soak: setup
	$(BIN)/python -m loadtests.soak --minutes 30 --out results/soak-cpu.json

# 10,000 requests to two replicas of the embedded model behind vLLM's router, and a quarter of them to stock's.
soak-replicas: setup
	$(BIN)/python -m loadtests.soak --requests 11000 --replicas 2 --aborted 0.33 --out results/soak-two-replicas.json
	$(BIN)/python -m loadtests.soak_chart results/soak-two-replicas.json docs/soak.png

# Two replicas of the embedded model, vLLM's router and Prometheus, as processes: http://127.0.0.1:8100/v1.
up down: setup
	$(BIN)/python deploy/local/stack.py $@

# With `make up`: breaks a replica, and waits until the alerts fire and clear (a quarter of an hour).
drill: setup
	$(BIN)/python deploy/local/drill.py

# Processes killed, a spoilt profile, a full disk, hanging clients, floods: each with 200 requests in flight on a stack of
# its own (half an hour; ports 8200 and above, so that make up may stay; mounting the small disk needs root).
faults: setup
	PYTHONPATH=. EOS_PORT=8200 EOS_STACK=runs/faults $(BIN)/python deploy/local/faults.py --page docs/operations.md

# Manifests, images, rules and flags, without a server (a minute); part of `make test`, which asks a live one as well.
deploy-check: setup
	$(BIN)/python -m pytest tests/deploy -m 'not serving'

# What the CPU image installs, with hashes. Where torch's CPU wheels are not on pip's index: UV_EXTRA_INDEX_URL.
lock: setup
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra serve --python-version 3.11 \
		--python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-annotate --no-emit-index-url \
		--no-emit-find-links --index-strategy unsafe-best-match --quiet --output-file deploy/requirements-cpu.lock

deploy-rules: setup
	$(BIN)/python deploy/monitoring/prometheusrule.py

docs: setup
	$(BIN)/eos-vllm profile schema > docs/eos-profile.schema.json.new
	mv docs/eos-profile.schema.json.new docs/eos-profile.schema.json

# The environment stays: it takes minutes to make, and holds nothing of the project but a link to it.
clean:
	rm -rf build dist .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
