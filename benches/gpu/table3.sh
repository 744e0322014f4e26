#!/usr/bin/env bash
# The systems of the paper's Table 3 on a GPU: from a checkout with the extension built and
#   python benches/gpu/table3.py prepare --text FILE --data DATA
# run beforehand, `table3.sh DATA`. Stops at $STOP seconds, by default 540, and can be started again:
# what is finished is in $OUT (by default table3_out/), and what is not is resumed.
set -u
here=$(cd "$(dirname "$0")" && pwd)
data=$(cd "$1" && pwd)
shift
cd "$here/../.."
export OUT=${OUT:-table3_out} PYTHONUNBUFFERED=1 PYTHONPATH=$PWD/python${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" "$here/table3.py" train --data "$data" --stop "${STOP:-540}" "$@"
