"""The models as PyTorch modules: vision encoder, projector, decoder, gated cross-attention, and their linears."""
