"""Reading and writing the checkpoints of other libraries: tensors, digests, and where they come from.

Nothing here knows a model or imports jax: the values are numpy arrays, under the names that their source
gave them.
"""
