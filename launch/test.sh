#!/usr/bin/env bash
# Sets up a virtual environment of its own and runs every test; arguments go to pytest, such as -m "not slow".
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh .venv-test ".[test]"
exec python -m pytest "$@"
