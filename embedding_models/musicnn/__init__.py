"""MusiCNN: its network, the encoder around it, and the reader of the TensorFlow checkpoint that its weights are in."""
