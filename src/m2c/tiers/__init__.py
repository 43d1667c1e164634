"""Where the bytes are right now: SSD reads, DRAM arenas, the neuron cache, the plan."""
