"""How well a memory is read and used: probes on held-out text, metrics and the results page."""
