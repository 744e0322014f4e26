#!/usr/bin/env bash
# The first minutes on a GPU: from a checkout with the extension built (python/bd3lm/_core.abi3.so).
# At most six minutes; results in $OUT, by default first_run_out/. Never stops at an error.
# Options as of `first_run.py run`: --only SECTION..., --budget SECONDS, --rehearse.
set -u
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
export OUT=${OUT:-first_run_out} FIRST_RUN_WORK=${FIRST_RUN_WORK:-$(mktemp -d)} PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD/python${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"
{
  date
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.limit --format=csv
  uname -a
  nproc
  ls -la python/bd3lm/*.so
} >"$OUT/env.txt" 2>&1
exec "${PYTHON:-python3}" "$here/first_run.py" run "$@"
