# The checks of this project, one function each; `.ci/run` and `.ci/all` say which of them run. Meant to be sourced.
# CONTRIBUTING.md has the table of what runs where.
set -euo pipefail

source_tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=${CI_WORK:-$(mktemp -d)}  # with CI_WORK, a second call finds the environments of the first
[[ -n ${CI_WORK:-} ]] || trap 'rm -rf "$work"' EXIT
mkdir -p "$work"
export JAX_COMPILATION_CACHE_DIR="$work/cache"  # not the user's
timings=""

step() {
  local name=$1 started=$SECONDS
  shift
  printf '\n=== %s\n' "$name"
  "$@" </dev/null
  timings+=$(printf '%6d s  %s' $((SECONDS - started)) "$name")$'\n'
}

all_green() {
  printf '\n=== all green in %d s\n%s' "$SECONDS" "$timings"
}

# What is not committed would not be merged, so it is not tested either.
clone_tree() {
  local changes
  changes=$(git -C "$source_tree" status --short || true)
  if [[ -n $changes ]]; then
    printf 'NOT TESTED, because not committed:\n%s\n' "$changes"
  fi
  rm -rf "$work/tree"
  local commit
  commit=$(git -C "$source_tree" rev-parse HEAD 2>/dev/null || echo none)
  if [[ $commit == none || $commit != "$(cat "$work/commit" 2>/dev/null)" ]]; then
    rm -rf "${work:?}"/{dist,of-commit}  # what was built of another commit
    printf '%s' "$commit" >"$work/commit"
  fi
  if git clone -q --no-local "$source_tree" "$work/tree"; then
    git -C "$work/tree" log -1 --format='testing %h %s'
  else  # an exported tree, without a repository
    mkdir -p "$work/tree"
    tar -C "$source_tree" --exclude=./.git --exclude='./.venv*' --exclude=./runs --exclude='*.so' \
      --exclude=__pycache__ -cf - . | tar -C "$work/tree" -xf -
  fi
  cd "$work/tree"
}

# ---- environments

# A Python of this version, wherever it is.
find_python() {
  local version=$1 candidate
  for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
    if "$candidate" -c '' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  printf 'Python %s is needed and not found\n' "$version" >&2
  return 1
}

# make_environment NAME PYTHON REQUIREMENT...: $environments/NAME with the wheel of this commit, unless it is there already.
environments=$work/of-commit
make_environment() {
  local name=$1 python=$2
  shift 2
  if [[ ! -e $environments/$name/complete ]]; then
    rm -rf "${environments:?}/$name"
    "$python" -m venv "$environments/$name"
    "$environments/$name/bin/pip" install -q "$(wheel)[test]" "$@"
    touch "$environments/$name/complete"
  fi
}

# .venv of the clone, with the tools; the README's command makes the same one without them.
main_environment() {
  [[ -x .venv/bin/python ]] || python3 -m venv .venv
  .venv/bin/pip install -q -e '.[test,dev]'
}

# ---- checks

# The line in the README's second code block: what runs here is what the README promises.
readme_command() {
  local command
  command=$(awk '/^```/ { fences += 1; next } fences == 3' README.md)
  printf '%s\n' "$command"
  bash -c "$command"
}

style() {
  .venv/bin/ruff check .
  .venv/bin/ruff format --check .
}

types() {
  .venv/bin/mypy
}

# Whole runs, several processes, layouts: too long for the README's command, too important to run one time in five.
landing_tests() {
  .venv/bin/python -m pytest -n 2 --dist worksteal -m 'landing and not slow'
}

# slow_tests [--fifth N] [PATH...]: the tests marked slow, or every fifth one of them.
slow_tests() {
  .venv/bin/python -m pytest -n 2 --dist worksteal -m 'slow and not gpu and not compile_gpu' "$@"
}

# Against torch and transformers, which nothing else needs.
parity_tests() {
  make_environment parity python3 torch==2.13.0 transformers==5.24.0
  copy_tests elsewhere-parity
  "$environments/parity/bin/python" -m pytest -m parity tests/parity
  cd "$work/tree"
}

# Damaged files for every reader: each is read, or refused in one line.
fuzz() {
  .venv/bin/python -m tests.fuzz --inputs 10000
}

# quick_tests_with PYTHON REQUIREMENT...: the quick tests with another Python and jax, against the wheel.
quick_tests_with() {
  local version=$1 python
  shift
  python=$(find_python "$version")
  make_environment "python$version" "$python" "$@"
  copy_tests "elsewhere$version"
  "$environments/python$version/bin/python" -m pytest -n 2 --dist worksteal \
    -m 'not slow and not repo and not gpu and not compile_gpu and not parity'
  cd "$work/tree"
}

# test_expert_parallel.py compiles with jax 0.11.2 too, but three of its figures differ: under a product travel 19 of 32
# exchanges instead of 22 (two tests), and a layer on one GPU keeps 173 MB where the formula has 340.
gpu_new="tests/compile_gpu/test_grouped_matmul.py tests/compile_gpu/test_moe_layer.py tests/compile_gpu/test_train_step.py"

# compile_for_gpus PYTHON JAX [PATH...]: tests/compile_gpu with one pair of Python and jax. It needs jax's CUDA plugin and
# compilers, no CUDA libraries and no GPU.
compile_for_gpus() {
  local version=$1 jax=$2 python
  shift 2
  python=$(find_python "$version")
  make_environment "gpu$version" "$python" "jax==$jax" "jaxlib==$jax" "jax-cuda13-pjrt==$jax" \
    "jax-cuda13-plugin==$jax" nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime
  copy_tests "elsewhere-gpu$version"
  "$environments/gpu$version/bin/python" -m pytest -n 2 --dist loadfile -m compile_gpu "${@:-tests/compile_gpu}"
  cd "$work/tree"
}

# A real Slurm and a real Open MPI, for the tests that start a run with them on this one machine.
install_schedulers() {
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    printf 'error: Slurm and Open MPI are needed, and installing them needs root and apt-get\n' >&2
    return 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge openmpi-bin >/dev/null
}

# The tests and their settings, but none of the packages, so that only the installed ones can be imported.
copy_tests() {
  rm -rf "${work:?}/$1"
  mkdir "$work/$1"
  cp -r tests pyproject.toml "$work/$1"
  cd "$work/$1"
}

build_wheel() {
  rm -rf "$work/dist" "$environments"
  .venv/bin/pip wheel -q . --no-deps -w "$work/dist"
}

wheel() {
  local wheels=("$work"/dist/moejax-*.whl)
  printf '%s' "${wheels[0]}"
}

# What a user does first with the wheel, and the tests that a wheel could fail: of files, paths and packages.
use_wheel() {
  make_environment wheel python3
  copy_tests elsewhere
  "$environments/wheel/bin/moejax" doctor
  "$environments/wheel/bin/moejax" train quickstart --steps 20 --eval.every 0 --workdir "$work/elsewhere/run"
  "$environments/wheel/bin/python" -m pytest -n 2 --dist worksteal -m 'not slow and not repo and not gpu and not compile_gpu and not parity' \
    tests/test_plain_installation.py tests/custom_ops/test_native.py \
    tests/train/test_{cli,config_io,doctor,export,report}.py
  cd "$work/tree"
}

# The other tests compile as cheaply as they can (tests/conftest.py); what is promised to the bit also runs as shipped.
as_shipped() {
  .venv/bin/python -m benchmarks.layouts
  MOEJAX_TEST_AS_SHIPPED=1 .venv/bin/python -m pytest -q -m landing tests/train/test_loop.py -k kill
}

# AddressSanitizer and UBSan over the tests of the native ops. Only the library is instrumented; Python loads their
# runtimes first. It takes the installed one's place: beside the sources either of both could be found. All memory that is
# handed out holds NaN, so the tests also find what a kernel should have written and did not.
sanitizers() {
  local installed
  installed=$(.venv/bin/python -c 'from custom_ops import native; print(native.cpu_library()._name)')
  .venv/bin/pip install -q cmake ninja
  .venv/bin/cmake -S . -B "$work/sanitized" -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" \
    -DCMAKE_BUILD_TYPE=Release -DMOEJAX_SANITIZE=ON -DMOEJAX_CUDA=OFF -DPython_EXECUTABLE="$PWD/.venv/bin/python" >/dev/null
  .venv/bin/cmake --build "$work/sanitized" >/dev/null
  mv "$installed" "$work/plain.so"
  cp "$work/sanitized/libmoejax_cpu.so" "$installed"
  LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255 \
    .venv/bin/python -m pytest -q tests/custom_ops -k 'not xla and not Triton and not Windows and not Reference and not out_of_memory'
  mv "$work/plain.so" "$installed"
}
