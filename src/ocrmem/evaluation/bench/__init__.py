"""What full size costs: ours and, in the same run on the same inputs, what a user would have instead."""
