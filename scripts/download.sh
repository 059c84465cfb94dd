#!/usr/bin/env bash
# Fetch the released checkpoints of a task into checkpoints/, those of text-to-image into ckpts/; run it again to continue
# an interrupted download.
#     bash scripts/download.sh class-to-image [--dir FOLDER] [--only NAME ...] [--dry-run]
set -euo pipefail
python="$(dirname "$0")/../.venv/bin/python"
[ -x "$python" ] || python=python
exec "$python" -m skipdit download "$@"
