"""How is the graph changed? One graph transformation a file, and the pass manager."""
