"""What someone with a Mac runs: it needs nothing of pippin."""
