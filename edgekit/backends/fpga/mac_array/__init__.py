"""Generator of a streaming engine: P × Q multiply-accumulate lanes that run a network layer by layer from block RAM."""
