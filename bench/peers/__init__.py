"""What ours is compared with: eager PyTorch, transformers, llama.cpp, PEFT, each behind one interface."""
