"""What training descends: InfoNCE, what is told apart from what, the bank, gradients from micro-batches."""
