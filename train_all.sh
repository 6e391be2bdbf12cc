#!/usr/bin/env bash
# Train all three audio spaces one after another, the quickest first, then print their test metrics.
# With --joint they are trained in one run: one text encoder, a head for each space.
# Other flags go to every train.py:  ./train_all.sh --epochs 30 --checkpoint-dir checkpoints/long
# Stops at the first that fails. PYTHON names another interpreter.
set -euo pipefail

python="${PYTHON:-python}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
encoders=(latent muq mert)

checkpoint_dir=checkpoints
joint=
previous=
words=()  # below, ${words[@]+...}: an empty list is an error in old versions of bash
for word in "$@"; do
    if [ "$word" = --joint ]; then
        joint=1
        continue
    fi
    case "$word" in
        --checkpoint-dir=*) checkpoint_dir="${word#*=}" ;;
        *) if [ "$previous" = --checkpoint-dir ]; then checkpoint_dir="$word"; fi ;;
    esac
    previous="$word"
    words+=("$word")
done

if [ "$joint" ]; then
    echo "=== ${encoders[*]}"
    "$python" "$here/train.py" --audio-encoder "${encoders[@]}" ${words[@]+"${words[@]}"}
else
    for encoder in "${encoders[@]}"; do
        echo "=== $encoder"
        "$python" "$here/train.py" --audio-encoder "$encoder" ${words[@]+"${words[@]}"}
    done
fi

echo "=== summary: $checkpoint_dir/training_summary.json"
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" "$python" -m text_to_audio.measuring.summary "$checkpoint_dir"
