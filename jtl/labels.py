"""What labels have in common, whatever reads or compares them."""

IGNORED = -100
"""The label of a position that has none: padding, the later pieces of a word, words that are not masked. PyTorch's and
transformers' number, so that batches and labels of theirs can be taken as they are."""
