#!/usr/bin/env bash
# Install and run all checks, from a bare clone. Arguments go to pytest:
#   bash scripts/test.sh
#   bash scripts/test.sh tests/test_dit.py -k golden
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh --dev
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
python -m pytest -q -n auto "$@"
