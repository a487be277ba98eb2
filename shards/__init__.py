"""The input pipeline reads images in WebDataset shards, from any fsspec URL, in an exact order."""
