#!/usr/bin/env bash
# Train all three audio spaces one after another, or in one run; `./train_all.sh --help` says how.
set -euo pipefail

python="${PYTHON:-python}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
encoders=(latent muq mert)

usage() {
    cat <<END
usage: ./train_all.sh [--help] [--joint] [flags of train.py]

Train the audio spaces ${encoders[*]} one after another, the quickest first, then print their test metrics.
Stops at the first that fails.

  --joint     train them in one run: one text encoder, a head for each space
  -h, --help  show this and exit

Every other flag goes to each train.py, except --audio-encoder, which is set here; \`python train.py --help\` lists them.
PYTHON in the environment names the interpreter (python).

examples:
  ./train_all.sh
  ./train_all.sh --epochs 30 --checkpoint-dir checkpoints/long
  ./train_all.sh --joint --resume auto
  PYTHON=.venv/bin/python ./train_all.sh --text-model models/MiniLM --lr 1e-3
END
}

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
        -h | --help) usage; exit ;;
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
