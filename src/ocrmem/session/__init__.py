"""A conversation in use: its memory grows turn by turn, and the LLM's keys and values of what stayed are reused."""
