"""What was done to a program, and why? Reports, explanations, diffs, graphs for other viewers, bisecting."""
