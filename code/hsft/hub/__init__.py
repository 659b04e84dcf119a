"""Pretrained HLLM checkpoints: fetched from the hub, checked, and written as model folders."""
