"""On what does it run? One target a file."""
