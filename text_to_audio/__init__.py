"""Text to audio space: configuration, text model, losses, metrics, data set reading, store and inference."""
