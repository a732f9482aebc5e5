"""Fine-tuning: rows of a dataset to packed batches, and the steps of a recipe on them."""
