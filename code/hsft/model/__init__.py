"""Models: item embeddings in, user vectors out, and the losses that train them."""
