"""Fine-tuning: rows, packing, recipes, the trainer and its checkpoints."""
