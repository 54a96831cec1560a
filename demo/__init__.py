"""The demonstration: a node, a simulated cloud, a device, and what happens when processes are killed."""
