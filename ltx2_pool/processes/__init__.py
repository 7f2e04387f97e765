"""How a child process starts, is watched and ends."""
