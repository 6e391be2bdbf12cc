"""Text towards audio. The rooms import only those above them in this list:

config, processes   every setting of a run; several GPUs
model/              pretrained text models, text encoder, head, temperature, checkpoints, inference
loading/            what a step reads: batches, tokens, vectors
loss/               InfoNCE, what is told apart from what, bank, gradient caching
measuring/          metrics, evaluation, baseline, curves, report page, summary, model card
training/           the run, its state, resuming, stopping, rates, log lines
planning/           what a run will take
"""
