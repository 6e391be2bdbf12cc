"""A library of music, indexed in Milvus by its audio vectors and searched by text."""
