"""An interpreter of saved .mlpackages: their program and their weights, with NumPy alone, on any machine.

It knows nothing of how pippin writes packages, nor of coremltools but the messages of the file format.
"""
