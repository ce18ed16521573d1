#!/usr/bin/env bash
# Set up, lint, test. Arguments go to pytest: scripts/test.sh -k masks
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest "$@"
