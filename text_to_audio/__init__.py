"""Training text towards audio: data set, store, text model, training run, measuring. Where to look:

data set -> store   musicbench, own_recordings (readers), recordings (captions, split), clips (files of an archive),
                    hub (downloads), work_file, shards, merging (a preparation in progress), store, store_writing,
                    verifying
model               config (every setting), pretrained, text_model, losses, bank, negatives (what is told apart),
                    gradient_caching, optimisation
a training run      run (what it is made of), steps, batching (what a step reads), processes (several GPUs), run_state,
                    checkpoints, resuming, stopping (never lost), footprint, memory, planning (train.py --plan)
measuring, showing  metrics, evaluation, baseline, reporting, curves, queries, report, charts, summary, model_card
everywhere          errors, logs; inference for those who use a checkpoint
"""
