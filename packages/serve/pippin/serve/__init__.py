"""Serving over gRPC with continuous batching."""
