"""MEMModel: splice, projection, freezing, adapter folder."""
