#!/usr/bin/env bash
# Sets up a virtual environment of its own and runs every test; arguments go to pytest, such as -k sampler.
#
# launch/test.sh --fast [...] leaves out tests that take more than ten seconds, and those that start other processes,
# compilers, schedulers or a stand-in of a cloud. It takes less than four minutes on two cores, once .cache/jax is warm.
set -euo pipefail
[[ ${1-} != -h && ${1-} != --help ]] || { sed -nE '2,/^[^#]/s/^#( |$)//p' "${BASH_SOURCE[0]}" && exit; }
cd "$(dirname "$0")/.."
source launch/venv.sh .venv-test ".[test]"
if [[ ${1-} == --fast ]]; then
    set -- -m "not slow and not processes" "${@:2}"
fi
exec python -m pytest "$@"
