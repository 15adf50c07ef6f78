#!/usr/bin/env bash
# Sets up a virtual environment of its own and runs every test; arguments go to pytest, such as -m "not slow".
set -euo pipefail
[[ ${1-} != -h && ${1-} != --help ]] || { sed -nE '2,/^[^#]/s/^#( |$)//p' "${BASH_SOURCE[0]}" && exit; }
cd "$(dirname "$0")/.."
source launch/venv.sh .venv-test ".[test]"
exec python -m pytest "$@"
