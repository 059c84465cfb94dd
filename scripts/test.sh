#!/usr/bin/env bash
# Install and run all checks, from a bare clone; --fast leaves out the tests that are marked slow. Other arguments go
# to pytest:
#   bash scripts/test.sh
#   bash scripts/test.sh --fast
#   bash scripts/test.sh tests/models/test_dit.py -k golden
set -euo pipefail
cd "$(dirname "$0")/.."

lane=()
if [ "${1:-}" = --fast ]; then
  lane=(-m "not slow")
  shift
fi
bash scripts/setup.sh --dev
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
python -m pytest -q -n auto ${lane[@]+"${lane[@]}"} "$@"
