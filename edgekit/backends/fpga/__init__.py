"""FPGA: an integer network, its exact interpreter, hardware generators and the open tools that implement them."""
