"""embeddings.h5: its layout, reading, writing, verifying."""
