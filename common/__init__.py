"""What every package may use: errors, logs, the hub, files that survive a kill. Knows nothing of music."""
