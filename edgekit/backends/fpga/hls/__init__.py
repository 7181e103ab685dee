"""A network as C++ for high-level synthesis (Vitis HLS), exact to the bit and proved by its own C simulation."""
