#!/usr/bin/env bash
# docs/images/report.png: the report of a quickstart run, in headless Chromium. Needs chromium and Pillow.
#   docs/images/make.sh [RUN]      RUN: the folder of a finished quickstart; without it one is run first
set -euo pipefail
cd "$(dirname "$0")/../.."
run=${1:-runs/quickstart}
[ $# -gt 0 ] || rlhf quickstart
page=$(realpath "$(rlhf report "$run")")
picture=$(mktemp --suffix .png)
trap 'rm -f "$picture"' EXIT
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1200,1515 \
  --screenshot="$picture" "file://$page"
# 64 colors suffice and take a quarter of the bytes.
python - "$picture" docs/images/report.png <<'PYTHON'
import sys
from PIL import Image
Image.open(sys.argv[1]).convert("RGB").quantize(64).save(sys.argv[2], optimize=True)
PYTHON
