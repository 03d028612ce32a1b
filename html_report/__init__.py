"""The page of a program: one HTML file that shows its graphs, passes and decisions, and needs no network."""
