"""Paths of HLLM's training code; the package itself is `hsft`."""
