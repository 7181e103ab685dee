"""LiteRT (TFLite) on the CPU: edgekit's own lowering of the one model, float or QDQ, to a .tflite file."""
