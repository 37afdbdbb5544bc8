"""Publishing, listing and downloading checkpoints, and looking at the code that comes with them.

The functions that a user calls are in :mod:`.publishing` and :mod:`.downloading`; nothing is imported here, so that
the command line's help does not wait for torch.
"""
