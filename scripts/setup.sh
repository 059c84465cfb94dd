#!/usr/bin/env bash
# Make .venv beside this repository's files and install skipdit in it, editable. Again: done at once if nothing changed.
#   bash scripts/setup.sh          # what sampling and training need
#   bash scripts/setup.sh --dev    # and what the tests need
#   PYTHON=python3.11 bash scripts/setup.sh
set -euo pipefail
cd "$(dirname "$0")/.."

case "${*:-}" in
  "") kind=plain package=. ;;
  --dev) kind=dev package=".[dev]" ;;
  *) echo "usage: bash scripts/setup.sh [--dev]" >&2; exit 2 ;;
esac

# The stamp holds what an installation depends on: where it is, and the list of dependencies. `dev` includes `plain`.
stamp="$(pwd; cat pyproject.toml)"
for installed in dev "$kind"; do
  if [ -x .venv/bin/python ] && [ "$(cat ".venv/installed-$installed" 2>/dev/null)" = "$stamp" ]; then exit 0; fi
done

if [ ! -x .venv/bin/python ]; then
  python="${PYTHON:-python3}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    found="$("$python" --version 2>/dev/null || echo "not there")"
    echo "error: skipdit needs Python 3.10 or newer, and $python is $found" >&2
    echo "       install one, or name one that is there: PYTHON=python3.11 bash scripts/setup.sh" >&2
    exit 1
  fi
  echo "making .venv with $("$python" --version)"
  "$python" -m venv .venv || {
    rm -rf .venv
    echo "error: $python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
    exit 1
  }
fi

progress() {  # of pip's many lines, those during which one waits
  while read -r line; do
    case "$line" in
      Downloading*[0-9][0-9][0-9].[0-9]\ MB\) | Downloading*GB\)) echo "  $line" ;;
      Installing\ collected*) echo "  unpacking" ;;
    esac
  done
}

echo "installing skipdit and its dependencies into .venv, about three minutes ..."
pip=".venv/bin/python -m pip --disable-pip-version-check"
if ! $pip install --progress-bar off --editable "$package" 2>&1 | tee .venv/install.log | progress; then
  tail -n 30 .venv/install.log >&2
  echo "error: pip could not install skipdit; the whole of its output is in .venv/install.log" >&2
  exit 1
fi
echo "$stamp" > ".venv/installed-$kind"
echo "installed in $SECONDS s"
