"""The unrolled architecture: a small dense network as a pipeline of adders, one inference per clock."""
