"""What a model would take on Apple's chips, by their published figures: estimates, of no device that was at hand."""
