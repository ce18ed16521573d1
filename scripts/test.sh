#!/usr/bin/env bash
# Set up, lint, test on all cores. Arguments go to pytest: scripts/test.sh -m "not slow" leaves slow tests out,
# scripts/test.sh -n 0 -k masks runs some in one process, where a debugger works.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
