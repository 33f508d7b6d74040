"""The gRPC edge: who may call, what arrives, and how each end is told."""
