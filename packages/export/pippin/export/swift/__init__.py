"""The Swift package of sample code that is written beside a model."""
