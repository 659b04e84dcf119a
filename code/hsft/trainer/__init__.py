"""The training loop on Lightning Fabric and what it needs: order of samples, optimizer, checkpoints."""
