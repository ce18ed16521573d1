#!/usr/bin/env bash
# Make .venv with what the project needs; does nothing where that is done.
#   scripts/setup.sh                      to run the project
#   scripts/setup.sh requirements-dev.txt to test it
# PYTHON chooses the interpreter (default python3).
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=${1:-requirements.txt}
done_mark=.venv/installed-$requirements

if [ -f "$done_mark" ] && cmp -s <(cat requirements*.txt) "$done_mark"; then exit 0; fi
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || {
  echo "$("$python" --version) is not 3.10 to 3.13; name another with PYTHON=python3.12 $0" >&2
  exit 2
}
echo "Installing $requirements into .venv (about 3 minutes and 6 GB the first time; PyTorch is most of it)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
cat requirements*.txt >"$done_mark"
