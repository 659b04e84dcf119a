"""Paths of HLLM's training code; see `hsft.data`."""
