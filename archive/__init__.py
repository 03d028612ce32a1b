"""The `.gw` file: programs as data that cannot run code when they are read."""
