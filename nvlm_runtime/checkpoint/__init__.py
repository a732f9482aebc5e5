"""Files to models and back: checkpoints, GGUF files, LoRA adapters, and new models from existing parts."""
