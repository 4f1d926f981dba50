"""Turns plans into results on a device: tables, KV pools, batches, logits, sampling, the worker."""
