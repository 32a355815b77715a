"""Reading and writing the checkpoints of other libraries: tensors, digests, and where they come from.

Nothing here knows a model: the values are numpy arrays under the names that their source gave them, until
`convert` fills a tree with them by a family's key rules.
"""
