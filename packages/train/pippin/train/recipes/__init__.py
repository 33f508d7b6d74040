"""The recipes: one short file each. See `pippin.train.recipe`."""
