"""Jobs of several processes: on this machine, and submitted to a cluster."""
