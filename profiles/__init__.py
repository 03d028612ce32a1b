"""What should be done there? One method a file, and the profile that replays its decisions."""
