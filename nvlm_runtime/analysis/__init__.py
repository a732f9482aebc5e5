"""What a model costs and what it attends to: memory plans, device limits, profiles, attention maps."""
