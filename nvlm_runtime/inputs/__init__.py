"""What a request is made of: pictures cut into tiles, token ids, chat templates, prompts, and where image tokens go."""
