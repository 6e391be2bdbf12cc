#!/usr/bin/env bash
# Train all three audio spaces one after another, the quickest first, then print their test metrics.
# Extra flags go to every train.py:  ./train_all.sh --epochs 30 --checkpoint-dir checkpoints/long
# Stops at the first that fails. PYTHON names another interpreter.
set -euo pipefail

python="${PYTHON:-python}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

checkpoint_dir=checkpoints
previous=
for word in "$@"; do
    case "$word" in
        --checkpoint-dir=*) checkpoint_dir="${word#*=}" ;;
        *) if [ "$previous" = --checkpoint-dir ]; then checkpoint_dir="$word"; fi ;;
    esac
    previous="$word"
done

for encoder in latent muq mert; do
    echo "=== $encoder"
    "$python" "$here/train.py" --audio-encoder "$encoder" "$@"
done

echo "=== summary: $checkpoint_dir/training_summary.json"
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" "$python" -m text_to_audio.summary "$checkpoint_dir"
