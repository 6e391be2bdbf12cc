"""What prepare_dataset.py needs besides encoders and store: data sets, captions and split, work in progress, shards."""
