"""The serving engine: which tokens of which requests each step computes. It knows neither JAX nor gRPC."""
