"""What a training step reads: captions dealt into batches, their tokens, their recordings' vectors."""
