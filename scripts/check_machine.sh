#!/bin/sh
# Checks what the machine must bring before `make` installs anything, and prints the Python to use.
# Usage: check_machine.sh [PYTHON ...]   the interpreters to try, in this order
set -u

missing() {
  printf 'pycomm cannot be built here: %s\n\n  %s\n\n' "$1" "$2" >&2
  exit 1
}

[ "$(uname -s)" = Linux ] || missing "this is $(uname -s)." \
  "pycomm needs Linux 5.6 or newer (memfd_create, pidfd_getfd); use a Linux machine or container."

# --- a C++20 compiler ---
compiler=${CXX:-}
for candidate in c++ g++ clang++; do
  [ -n "$compiler" ] || compiler=$(command -v "$candidate" || true)
done
install_compiler="Install GCC 11 (or Clang 14) or newer:  apt-get install g++   or   dnf install gcc-c++
  A compiler elsewhere is named by CXX:  make CXX=/path/to/g++"
[ -n "$compiler" ] || missing "there is no C++ compiler." "$install_compiler"

scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
cat >"$scratch/test.cpp" <<'CPP'
#include <atomic>
#include <coroutine>
#include <span>
template <typename T>
concept Small = sizeof(T) <= 8;
int main() {
  std::atomic<int> word{1};
  word.wait(0);
  return Small<int> && std::span<int>().empty() && !std::suspend_never().await_ready();
}
CPP
# shellcheck disable=SC2086  # CXX may hold arguments: "ccache g++"
if ! $compiler -std=c++20 -pthread "$scratch/test.cpp" -o "$scratch/test" 2>"$scratch/errors"; then
  head -n 5 "$scratch/errors" >&2
  missing "$compiler does not compile C++20." "$install_compiler"
fi

# --- a Python ---
tried=
for python in "$@"; do
  command -v "$python" >/dev/null 2>&1 || continue
  tried="$tried $python"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
  "$python" -c 'import ensurepip, venv' 2>/dev/null || missing "$python has no venv module." \
    "apt-get install python3-venv"
  headers=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
  [ -f "$headers/Python.h" ] || missing "$python has no C headers ($headers/Python.h)." \
    "apt-get install python3-dev   or   dnf install python3-devel"
  printf '%s\n' "$python"
  exit 0
done
missing "there is no Python 3.10 or newer (tried:${tried:- nothing found})." \
  "apt-get install python3 python3-venv python3-dev, or name one:  make PYTHON=/path/to/python3"
