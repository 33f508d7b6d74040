"""The config tree, component contracts, sharding, checkpoints, bundles and tokenizers of pippin."""
