"""The input pipeline: images in WebDataset shards, from any fsspec URL, in an exact order."""
