"""Training of models that will be compressed: layers that compute with the numbers which will be stored."""
