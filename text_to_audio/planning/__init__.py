"""What a run will take before it is started: steps, tokens, bytes, device memory."""
