"""A Dynamo worker that serves LTX-2 video from a pool of shape-pinned processes."""

__version__ = "0.1.0"
