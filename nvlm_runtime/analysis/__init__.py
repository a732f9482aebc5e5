"""What a model costs and where it looks: memory plans, profiles, attention maps."""
