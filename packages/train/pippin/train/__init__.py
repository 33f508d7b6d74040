"""The trainer: recipes, learners, input, evaluation and launchers."""
