"""What becomes memory, and its pages and features."""
