"""Building blocks of models, each holding one rank's part of its weights.

A layer is a plain object: call it on tensors, ask it for its weight targets. Layers know ops,
groups and quantization methods, not checkpoints' folders, requests or architectures.
"""
