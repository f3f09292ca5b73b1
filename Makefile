# Every verb sets up what it needs in .venv; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
BIN := .venv/bin
# Of an environment that has a CUDA build of torch already: make test-gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
# How tests are shared out (tests/conftest.py says what stays together): every worker takes about 1 GB.
SHARED := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
.PHONY: demo serve test test-gpu sanitize-gpu lint format clean install

demo: .venv/demo  ## compress, publish and serve four fine-tunes, ask them all, print the table
	$(BIN)/python examples/demo/demo.py

serve: .venv/demo  ## the same variants, served until Ctrl-C
	$(BIN)/python examples/demo/demo.py --keep

test: .venv/dev  ## all tests
	$(BIN)/python -m pytest $(SHARED)

test-gpu: $(if $(filter $(BIN)/%,$(GPU_PYTHON)),.venv/dev)  ## kernels, decoder and engine on this machine's GPU
	$(GPU_PYTHON) -c "import torch; assert torch.cuda.is_available(), 'no CUDA device'"
	$(GPU_PYTHON) -m pytest tests/kernels tests/engine

# Without torch's caching every tensor is an allocation of its own, beyond which memcheck sees any access. The first
# run compiles the kernels, which takes minutes under the sanitizer, where every compiler it starts is watched.
SANITIZED := -m pytest -p no:cacheprovider tests/engine/test_device_decoder.py -k "every_kind or binary"
sanitize-gpu:  ## a decode step and prompts of every kind of delta under compute-sanitizer
	$(GPU_PYTHON) $(SANITIZED)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
	  --target-processes application-only $(GPU_PYTHON) $(SANITIZED)

lint: .venv/dev  ## ruff and pyright
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/dev
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

install: .venv/dev  ## a development environment in .venv

.venv/demo: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -e '.[demo]'
	@touch $@

.venv/dev: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@ .venv/demo

clean:
	rm -rf .venv .demo build dist *.egg-info
