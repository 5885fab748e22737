"""A model's parts as ONNX graphs, so that it trains and runs without torch: their format, derivation and sessions."""
