"""What indexing a folder of music will take, before it is started."""
