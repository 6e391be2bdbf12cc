"""Audio files of any kind to blocks of samples: libsndfile first, ffmpeg where that refuses, decoded to the end."""
