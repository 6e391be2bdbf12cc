"""The trained model: text encoder, projection head, temperature, checkpoints, and using one."""
